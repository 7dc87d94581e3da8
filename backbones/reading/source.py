"""Opens a SOURCE (path, file:, run:, official:, timm:, hf:) as a Checkpoint: the ViT's named tensors and what describes them."""

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

from backbones.reading.description import read_json
from backbones.reading.hub import fetch_repo, log_once
from backbones.reading.official import fetch_official, find_name
from backbones.reading.safe import State, WeightFile, check_tensors, check_unchanged, read_file
from backbones.reading.shards import INDEX_SUFFIX, read_shards
from backbones.reading.unwrap import unwrap
from mae_bench.errors import UserError, did_you_mean, near_path
from mae_bench.export import EXPORT, SPEC_FILE, WEIGHTS_FILE
from mae_bench.files import file_digest

CONFIG_FILE = "config.json"  # of Hugging Face and timm folders
PREPROCESSOR_FILE = "preprocessor_config.json"  # of Hugging Face folders
OPEN_CLIP_CONFIG = "open_clip_config.json"  # of OpenCLIP's folders
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
SPEC_KEY = "spec"  # where files that we write carry the BackboneSpec


@dataclass(frozen=True)
class Checkpoint:
    """What stands in a weight file and beside it.

    tensors: of the ViT, without the prefix that they have in the file. wrapper: the keys that lead to the dictionary that held
    them, joined by dots ("" for a bare one). outside: that dictionary's tensors without the prefix. extras: what else the file
    holds. beside: the JSON files of the same folder by name. stated_spec: the BackboneSpec that our writers put into a file.
    """

    source: str
    digest: str
    tensors: dict[str, torch.Tensor]
    size: int = 0  # bytes of the weight file
    wrapper: str = ""
    prefix: str = ""
    outside: dict[str, torch.Tensor] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)
    stated_spec: dict[str, Any] = field(default_factory=dict)
    trusted: bool = False  # its pickle was run, in a subprocess without network (`backbones.reading.trust`)
    files: dict[str, str] = field(
        default_factory=dict
    )  # name -> SHA-256 of each file that was read: the weights, then `beside`
    format: str | None = None  # that the source itself tells; else it is detected
    notes: list[str] = field(default_factory=list)  # what the reader of a report should know of the source
    states: Mapping[Path, State] = field(
        default_factory=dict
    )  # of the weight files, when their digests were taken

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of the dictionary by the names that they have in the file, the ViT's and the others."""
        return {self.prefix + name: tensor for name, tensor in self.tensors.items()} | self.outside

    @property
    def label(self) -> str:
        """Where in the file the ViT is: wrapper and prefix as one dotted name, "" for the top level."""
        return ".".join(part.strip(".") for part in (self.wrapper, self.prefix) if part.strip("."))

    def check_unchanged(self) -> None:
        """UserError if a weight file has changed since it was opened; for whoever has copied the tensors, which may be mapped."""
        check_unchanged(self.states)


def open_source(
    source: str | Path, sha256: str | None = None, weights: str | None = None, *, trust: bool = False
) -> Checkpoint:
    """The Checkpoint behind a SOURCE; UserError for one that is unknown, missing, damaged or not the one that `sha256` pins.

    weights: which set of weights, where the file holds several (teacher, student, model_ema ...). trust: unpickle in a subprocess
    without network what cannot be read as data (`backbones.reading.trust`).
    """
    kind, colon, rest = str(source).partition(":")
    if not colon or Path(source).exists():
        return _open_path(str(source), Path(source), sha256, weights, trust)
    if kind == "file":
        return _open_path(str(source), Path(rest), sha256, weights, trust)
    if kind == "run":
        return _open_path(str(source), Path(rest) / EXPORT, sha256, weights, trust)
    if kind == "official":
        path, entry = fetch_official(rest)
        opened = _open_path(str(source), path, sha256, weights or entry.weights, trust)
        return replace(opened, format=entry.format)
    if kind == "timm":
        return _open_timm(rest, sha256)
    if kind == "hf":
        folder, pinned, notes = fetch_repo(rest)
        return replace(_open_path(f"hf:{pinned}", folder, sha256, weights, trust), notes=notes)
    if kind in ("http", "https"):
        known = find_name(str(source))
        raise UserError(
            f"{source} is an address",
            expected="weights that lie here, or by a name that is known",
            fix=f"give official:{known}" if known else "download it and give its path",
        )
    raise UserError(
        f"source {source}",
        expected="a path, file:PATH, run:DIR (a cell's folder), official:NAME, timm:NAME or hf:REPO@REVISION",
    )


def _open_path(
    source: str, path: Path, sha256: str | None, weights: str | None, trust: bool = False
) -> Checkpoint:
    path = path / EXPORT if (path / EXPORT).is_dir() else path  # a cell's folder: the backbone that it made
    if not path.exists():
        raise UserError(
            f"no weight file {path}",
            expected="a .safetensors, .pth, .pt or .bin file, or a folder of it",
            fix=near_path(path),
        )
    file = _weights_of(path) if path.is_dir() else path
    read, files = _read(file, sha256, trust)
    digest, size = read.digest, read.size
    part = unwrap(read.content, source, weights)
    check_tensors(part.tensors | part.outside, file, size)
    names = (SPEC_FILE, CONFIG_FILE, PREPROCESSOR_FILE, OPEN_CLIP_CONFIG)
    beside = {name: read_json(file.parent / name) for name in names if (file.parent / name).is_file()}
    if file.name != WEIGHTS_FILE and not path.is_dir():
        beside = {
            name: value
            for name, value in beside.items()
            if name != SPEC_FILE or value.get("digest") == digest
        }
    stated = _stated(read.metadata.get(SPEC_KEY), part.extras.get(SPEC_KEY), file)
    tensors = {name: tensor.detach() for name, tensor in part.tensors.items()}
    by_chance = (
        () if path.is_dir() or file.name in WEIGHT_FILES else set(beside) - {SPEC_FILE}
    )  # they may be of another file
    notes = [f"{name} lies beside the file and is followed" for name in sorted(by_chance)]
    files |= {name: file_digest(file.parent / name) for name in beside}
    return Checkpoint(
        source, digest, tensors, size, part.wrapper, part.prefix, part.outside, part.extras, beside, stated, read.trusted, files,
        notes=notes, states=read.states,
    )  # fmt: skip


def _read(file: Path, sha256: str | None, trust: bool) -> tuple[WeightFile, dict[str, str]]:
    """What stands in one file, or in the shards of an index; the SHA-256 of each file that holds weights."""
    if file.name.endswith(INDEX_SUFFIX):
        return read_shards(file, sha256, trust)
    read = read_file(file, sha256, trust)
    return read, {file.name: read.digest}


def _weights_of(folder: Path) -> Path:
    """The first of WEIGHT_FILES: where a folder has both, pytorch_model.bin is the same weights as model.safetensors."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    listed = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
    raise UserError(
        f"{folder} holds {listed}",
        expected=f"one weight file: {' or '.join(WEIGHT_FILES)}",
        fix="name the weight file itself",
    )


def _stated(in_metadata: str | None, in_extras: Any, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(in_metadata) if in_metadata else in_extras or {}
    except ValueError as error:
        raise UserError(f"{path}: its metadata's {SPEC_KEY} is not JSON: {error}") from error
    return dict(value) if isinstance(value, dict) else {}


def _open_timm(name: str, sha256: str | None) -> Checkpoint:
    """Weights and facts of a pretrained timm model, fetched by timm itself; the digest is of the weights as safetensors."""
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
    ) as error:  # the hub's client, urllib and timm each have their own types; to the user all mean one thing
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"timm cannot provide the weights of {name!r}: {reason}",
            expected="a network, or the weights in the hub's cache",
            fix="download the file elsewhere and give its path",
        ) from error
    if not isinstance(model, VIT_CLASSES):
        raise UserError(
            f"timm:{name} is a {type(model).__name__}",
            expected=f"one of {', '.join(c.__name__ for c in VIT_CLASSES)}",
        )
    tensors = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 and sha256.lower() != digest:
        raise UserError(f"the weights of timm:{name} have SHA-256 {digest}", expected=sha256)
    cfg: Any = model.pretrained_cfg
    config = {"architecture": name.split(".")[0], "pretrained_cfg": dict(cfg)}
    files = {f"{name}.safetensors": digest}
    return Checkpoint(f"timm:{name}", digest, tensors, len(data), beside={CONFIG_FILE: config}, files=files)
