"""Read and write classifiers: the linear head that a backbone was trained with."""

import json
from pathlib import Path

import torch
from torch import nn

from backbones.reading.safe import check_values, read_file
from backbones.reading.source import Checkpoint
from backbones.writing import write_safetensors
from mae_bench.errors import UserError
from mae_bench.job import EXPORT
from mae_bench.spec import BackboneSpec

# Shapes: K classes, D width.
HEAD_FILE = "head.safetensors"
HEADS = (
    "head",
    "classifier",
    "fc",
    "head.fc",
    "head.layers.head",
    "linear",
)  # names of the last linear layer
# The reference's linear probe (main_linprobe.py): a BatchNorm without affine parameters, then the linear
# layer.
PROBE_NORM = "head.0"
PROBE = "head.1"
PROBE_EPS = 1e-6


def extract_head(checkpoint: Checkpoint) -> nn.Linear | None:
    """Return a checkpoint's linear classifier, or None; a probe's BatchNorm is folded into it.

    Raises UserError for a head that is not one linear layer on pooled features (a distilled model has two).
    """
    stored = {name.removeprefix(checkpoint.prefix): tensor for name, tensor in checkpoint.stored.items()}
    if "head_dist.weight" in stored:
        raise UserError(
            f"{checkpoint.source} has two heads (distillation)", expected="one linear head on pooled features"
        )
    name = next((name for name in (PROBE, *HEADS) if _is_linear(stored, name)), None)
    if name is None:
        return None
    weight, bias = stored[f"{name}.weight"].float(), stored[f"{name}.bias"].float()
    check_values({"head.weight": weight, "head.bias": bias}, checkpoint.source)
    if name == PROBE and f"{PROBE_NORM}.running_mean" in stored:
        mean = stored[f"{PROBE_NORM}.running_mean"].float()
        variance = stored[f"{PROBE_NORM}.running_var"].float()
        weight = weight / (variance + PROBE_EPS).sqrt()
        bias = bias - weight @ mean
    return build_linear(weight, bias)


def _is_linear(stored: dict[str, torch.Tensor], name: str) -> bool:
    weight, bias = stored.get(f"{name}.weight"), stored.get(f"{name}.bias")
    return weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]


def build_linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """Return a linear layer with copies of a weight (K, D) and a bias (K,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.load_state_dict({"weight": weight.clone(), "bias": bias.clone()}, assign=True)
    return layer


def write_head(folder: Path, head: nn.Linear, classes: list[str], spec: BackboneSpec) -> None:
    """Write the head into the folder of an exported backbone, with its class names (empty if unknown)."""
    weights = {"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu()}
    write_safetensors(folder / HEAD_FILE, weights, spec, {"classes": classes})


def load_head(source: str | Path) -> tuple[nn.Linear, list[str]]:
    """Load the head next to the backbone of `source`, and its class names (empty if unknown).

    Raises UserError if there is none.
    """
    path = _find_head(source)
    if path is None:
        raise UserError(
            f"{source} has no classifier",
            expected="a fine-tuned or linear-probe checkpoint with its head",
            fix="fine-tune with export_classifier=true, or use a protocol that trains a head",
        )
    file = read_file(path)
    classes = json.loads(file.metadata["provenance"])["classes"]
    return build_linear(file.content["weight"], file.content["bias"]), list(classes)


def has_head(source: str | Path) -> bool:
    """Return whether `load_head` finds a head."""
    return _find_head(source) is not None


def _find_head(source: str | Path) -> Path | None:
    folder = Path(str(source).removeprefix("run:"))
    paths = [folder / HEAD_FILE, folder / EXPORT / HEAD_FILE]
    return next((path for path in paths if path.is_file()), None)
