"""Opens a SOURCE (a path, file:, run:, timm:) as a Checkpoint: the ViT's named tensors and what the file says of them."""

import difflib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from backbones.safe import check_tensors, read_file
from backbones.unwrap import unwrap
from mae_bench.errors import UserError
from mae_bench.export import EXPORT, SPEC_FILE, WEIGHTS_FILE

CONFIG_FILE = "config.json"  # of Hugging Face and timm folders
PREPROCESSOR_FILE = "preprocessor_config.json"  # of Hugging Face folders
WEIGHT_FILES = (WEIGHTS_FILE, "model.safetensors", "pytorch_model.bin")
SPEC_KEY = "spec"  # where files that we write carry the BackboneSpec
MAX_JSON = 1 << 20


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

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of the dictionary by the names that they have in the file, the ViT's and the others."""
        return {self.prefix + name: tensor for name, tensor in self.tensors.items()} | self.outside

    @property
    def label(self) -> str:
        """Where in the file the ViT is: wrapper and prefix as one dotted name, "" for the top level."""
        return ".".join(part.strip(".") for part in (self.wrapper, self.prefix) if part.strip("."))


def open_source(source: str | Path, sha256: str | None = None, weights: str | None = None) -> Checkpoint:
    """The Checkpoint behind a SOURCE; UserError for one that is unknown, missing, damaged or not the one that `sha256` pins.

    weights: which set of weights, where the file holds several (teacher, student, model_ema ...).
    """
    kind, colon, rest = str(source).partition(":")
    if not colon or Path(source).exists():
        return _open_path(str(source), Path(source), sha256, weights)
    if kind == "file":
        return _open_path(str(source), Path(rest), sha256, weights)
    if kind == "run":
        return _open_path(str(source), Path(rest) / EXPORT, sha256, weights)
    if kind == "timm":
        return _open_timm(rest, sha256)
    raise UserError(f"source {source}", expected="a path, file:PATH, run:DIR (a cell's folder) or timm:NAME")


def _open_path(source: str, path: Path, sha256: str | None, weights: str | None) -> Checkpoint:
    path = path / EXPORT if (path / EXPORT).is_dir() else path  # a cell's folder: the backbone that it made
    file = _weights_of(path) if path.is_dir() else path
    content, metadata, digest = read_file(file, sha256)
    part = unwrap(content, source, weights)
    size = file.stat().st_size
    check_tensors(part.tensors | part.outside, file, size)
    names = (SPEC_FILE, CONFIG_FILE, PREPROCESSOR_FILE)
    beside = {name: _read_json(file.parent / name) for name in names if (file.parent / name).is_file()}
    if file.name != WEIGHTS_FILE and not path.is_dir():
        beside = {name: value for name, value in beside.items() if name != SPEC_FILE or value.get("digest") == digest}
    stated = _stated(metadata.get(SPEC_KEY), part.extras.get(SPEC_KEY), file)
    tensors = {name: tensor.detach() for name, tensor in part.tensors.items()}
    return Checkpoint(source, digest, tensors, size, part.wrapper, part.prefix, part.outside, part.extras, beside, stated)


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes are too many for a description")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}", expected="a JSON file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}", expected="a JSON object")
    return value


def _stated(in_metadata: str | None, in_extras: Any, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(in_metadata) if in_metadata else in_extras or {}
    except ValueError as error:
        raise UserError(f"{path}: its metadata's {SPEC_KEY} is not JSON: {error}") from error
    return dict(value) if isinstance(value, dict) else {}


def _open_timm(name: str, sha256: str | None) -> Checkpoint:
    """Weights and facts of a pretrained timm model, fetched by timm itself; the digest is of the weights as safetensors."""
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(pretrained=True), n=3)
        raise UserError(f"timm has no model {name!r}", fix=f"did you mean {', '.join(near)}?" if near else "")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client, urllib and timm each have their own types; to the user all mean one thing
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"timm cannot provide the weights of {name!r}: {reason}",
            expected="a network, or the weights in the hub's cache",
            fix="download the file elsewhere and give its path",
        ) from error
    if not isinstance(model, VisionTransformer):
        raise UserError(f"timm:{name} is a {type(model).__name__}", expected="a timm VisionTransformer")
    tensors = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 and sha256.lower() != digest:
        raise UserError(f"the weights of timm:{name} have SHA-256 {digest}", expected=sha256)
    cfg: Any = model.pretrained_cfg
    config = {"architecture": name.split(".")[0], "pretrained_cfg": dict(cfg)}
    return Checkpoint(f"timm:{name}", digest, tensors, len(data), beside={CONFIG_FILE: config})
