"""Open a SOURCE (path, file:, run:, official:, timm:, hf:) as a Checkpoint of tensors and descriptions."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM

from backbones.reading.description import check_description, get_conversion, read_json
from backbones.reading.hub import fetch_repo, log_once
from backbones.reading.licence import find_licence
from backbones.reading.official import fetch_official, find_name
from backbones.reading.safe import State, WeightFile, check_tensors, check_unchanged, read_file
from backbones.reading.shards import INDEX_SUFFIX, read_shards
from backbones.reading.unwrap import join_label, unwrap
from mae_bench.errors import UserError, did_you_mean, near_path
from mae_bench.export import EXPORT, SPEC_FILE, WEIGHTS_FILE
from mae_bench.files import file_digest

CONFIG_FILE = "config.json"  # in Hugging Face and timm folders
PREPROCESSOR_FILE = "preprocessor_config.json"  # in Hugging Face folders
OPEN_CLIP_CONFIG = "open_clip_config.json"  # in OpenCLIP folders
DESCRIPTIONS = (SPEC_FILE, CONFIG_FILE, PREPROCESSOR_FILE, OPEN_CLIP_CONFIG)
# In order of preference: if a folder has both, pytorch_model.bin holds the same weights as model.safetensors.
WEIGHT_FILES = (
    WEIGHTS_FILE,
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
VIT_CLASSES = (VisionTransformer, Beit, Eva, VisionTransformerSAM)  # of timm
# Metadata keys under which our files carry the BackboneSpec, and what they were made from.
SPEC_KEY, PROVENANCE_KEY = "spec", "provenance"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weight file and of the descriptions in its folder.

    source: as given, with a hub's revision resolved to its commit. digest: SHA-256 of the weights.
    tensors: the ViT's, without their prefix in the file. size: bytes of the weight file.
    wrapper: the keys that lead to their dictionary, joined by dots ("" at the top level). prefix: of their
    names there.
    outside: the dictionary's other tensors, by full name. extras: everything else in the file.
    beside: the JSON descriptions in the same folder, by file name. stated_spec: the BackboneSpec in our own
    files. conversion: the report of the conversion that wrote one of them.
    files: SHA-256 of every file that was read, by name: weights, then descriptions.
    format: if the source determines it, else None and it is detected. notes: what a reader of the report
    should know.
    licence: of the weights, as their publisher states it; "" if unknown. score: published for this file.
    states: size and times of each weight file when its digest was taken.
    """

    source: str
    digest: str
    tensors: dict[str, torch.Tensor]
    size: int = 0
    wrapper: str = ""
    prefix: str = ""
    outside: dict[str, torch.Tensor] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)
    stated_spec: dict[str, Any] = field(default_factory=dict)
    conversion: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    format: str | None = None
    notes: list[str] = field(default_factory=list)
    licence: str = ""
    score: str = ""
    states: Mapping[Path, State] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """All tensors of the dictionary, the ViT's and the others, by their names in the file."""
        return {self.prefix + name: tensor for name, tensor in self.tensors.items()} | self.outside

    @property
    def label(self) -> str:
        """The place of the ViT in the file: wrapper and prefix as one dotted name, "" at the top level."""
        return join_label(self.wrapper, self.prefix)

    def check_unchanged(self) -> None:
        """Raise UserError if a weight file has changed since it was opened; call it after copying tensors."""
        check_unchanged(self.states)


def open_source(source: str | Path, sha256: str | None = None, weights: str | None = None) -> Checkpoint:
    """Open a SOURCE; raise UserError if it is unknown, missing, damaged or does not have the digest `sha256`.

    weights: which set of weights to read from a file with several (teacher, student, model_ema, ...).
    """
    kind, colon, rest = str(source).partition(":")
    if not colon or Path(source).exists():
        return _open_path(str(source), Path(source), sha256, weights)
    if kind == "file":
        return _open_path(str(source), Path(rest), sha256, weights)
    if kind == "run":
        return _open_path(str(source), Path(rest) / EXPORT, sha256, weights)
    if kind == "official":
        path, entry = fetch_official(rest)
        opened = _open_path(str(source), path, sha256, weights or entry.weights)
        return replace(opened, format=entry.format, licence=entry.licence, score=entry.score)
    if kind == "timm":
        return _open_timm(rest, sha256)
    if kind == "hf":
        folder, pinned, notes = fetch_repo(rest)
        return replace(_open_path(f"hf:{pinned}", folder, sha256, weights), notes=notes)
    if kind in ("http", "https"):
        name = find_name(str(source))
        raise UserError(
            f"{source} is a URL",
            expected="a local file, or the name of known weights",
            fix=f"give official:{name}" if name else "download it and give its path",
        )
    raise UserError(
        f"source {source}",
        expected="a path, file:PATH, run:DIR (a cell's folder), official:NAME, timm:NAME or hf:REPO@REVISION",
    )


def _open_path(source: str, path: Path, sha256: str | None, weights: str | None) -> Checkpoint:
    # 1. Find the weight file: in a cell's folder that of its exported backbone.
    if (path / EXPORT).is_dir():
        path = path / EXPORT
    if not path.exists():
        raise UserError(
            f"no weight file {path}",
            expected="a .safetensors, .pth, .pt or .bin file, or a folder with one",
            fix=near_path(path),
        )
    file = _find_weights(path) if path.is_dir() else path

    # 2. Read it as data and select one set of ViT weights.
    read, files = _read(file, sha256)
    part = unwrap(read.content, source, weights)
    check_tensors(part.tensors | part.outside, file, read.size)

    # 3. Read the descriptions in its folder.
    beside = _read_descriptions(file, read.digest, in_named_folder=path.is_dir())
    stated_spec = _parse(SPEC_KEY, read.metadata, part.extras, file)
    described = beside.get(SPEC_FILE, {})
    if stated_spec and not described:
        described = {PROVENANCE_KEY: _parse(PROVENANCE_KEY, read.metadata, part.extras, file)}
    conversion = get_conversion(described.get(PROVENANCE_KEY))
    notes = []
    if not path.is_dir() and file.name not in WEIGHT_FILES:  # they may describe another file
        notes = [f"{name} in the same folder was used" for name in sorted(set(beside) - {SPEC_FILE})]
    return Checkpoint(
        source=source,
        digest=read.digest,
        tensors={name: tensor.detach() for name, tensor in part.tensors.items()},
        size=read.size,
        wrapper=part.wrapper,
        prefix=part.prefix,
        outside=part.outside,
        extras=part.extras,
        beside=beside,
        stated_spec=stated_spec,
        conversion=conversion,
        files=files | {name: file_digest(file.parent / name) for name in beside},
        notes=notes,
        licence=find_licence(conversion, file.parent if path.is_dir() else None),
        states=read.states,
    )


def _read(file: Path, sha256: str | None) -> tuple[WeightFile, dict[str, str]]:
    """Return the content of one file or of an index's shards, and the SHA-256 of each weight file by name."""
    if file.name.endswith(INDEX_SUFFIX):
        return read_shards(file, sha256)
    read = read_file(file, sha256)
    return read, {file.name: read.digest}


def _read_descriptions(file: Path, digest: str, in_named_folder: bool) -> dict[str, dict[str, Any]]:
    """Return the JSON descriptions in a file's folder by name; our own only if it is of these weights."""
    paths = [file.parent / name for name in DESCRIPTIONS]
    beside = {path.name: read_json(path) for path in paths if path.is_file()}
    if SPEC_FILE in beside:
        beside[SPEC_FILE] = check_description(beside[SPEC_FILE], file.parent / SPEC_FILE)
    is_ours = file.name == WEIGHTS_FILE or in_named_folder
    if SPEC_FILE in beside and not is_ours and beside[SPEC_FILE].get("digest") != digest:
        del beside[SPEC_FILE]
    return beside


def _find_weights(folder: Path) -> Path:
    """Return the first of `WEIGHT_FILES` in a folder."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    listed = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise UserError(
        f"{folder} holds {listed}",
        expected=f"one weight file: {' or '.join(WEIGHT_FILES)}",
        fix="give the path of the weight file itself",
    )


def _parse(key: str, metadata: Mapping[str, str], extras: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what one of our files holds under a key, as JSON or as a dictionary; {} for another file."""
    try:
        value = json.loads(metadata[key]) if key in metadata else extras.get(key)
    except ValueError as error:
        raise UserError(f"{path}: {key} in its metadata is not JSON: {error}") from error
    return dict(value) if isinstance(value, dict) else {}


def _open_timm(name: str, sha256: str | None) -> Checkpoint:
    """Open a pretrained timm model; the digest is that of the weights saved as safetensors."""
    if not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"timm has no model {name!r}",
            fix=did_you_mean(name, timm.list_models(pretrained=True), cutoff=0.6),
        )
    try:
        with log_once():
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except (
        Exception
    ) as error:  # the hub's client, urllib and timm have their own types; all mean the same to the user
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"timm cannot provide the weights of {name!r}: {reason}",
            expected="a network, or the weights in the hub's cache",
            fix="download the file elsewhere and give its path",
        ) from error
    if not isinstance(model, VIT_CLASSES):
        raise UserError(
            f"timm:{name} is a {type(model).__name__}",
            expected=f"one of {', '.join(cls.__name__ for cls in VIT_CLASSES)}",
        )
    tensors = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 and sha256.lower() != digest:
        raise UserError(f"the weights of timm:{name} have SHA-256 {digest}", expected=sha256)
    pretrained_cfg: Any = model.pretrained_cfg
    config = {"architecture": name.split(".")[0], "pretrained_cfg": dict(pretrained_cfg)}
    files = {f"{name}.safetensors": digest}
    return Checkpoint(
        f"timm:{name}",
        digest,
        tensors,
        len(data),
        beside={CONFIG_FILE: config},
        files=files,
        licence=str(dict(pretrained_cfg).get("license") or ""),
    )
