"""Classifiers: a backbone with the head that it was trained with, from anyone's file, and the file that our jobs write."""

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

HEAD_FILE = "head.safetensors"
# Names of the last linear layer in the field's files.
HEADS = ("head", "classifier", "fc", "head.fc", "head.layers.head", "linear")
PROBE = "head.1"  # of the reference's linear probe: behind a BatchNorm without affine parameters
PROBE_NORM = "head.0"
PROBE_EPS = 1e-6  # main_linprobe.py


def extract_head(checkpoint: Checkpoint) -> nn.Linear | None:
    """The linear classifier in a checkpoint, None where there is none; a probe's BatchNorm is folded into it.

    UserError for a head that is no plain linear layer on pooled features (a distilled model's two).
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
        mean, variance = (stored[f"{PROBE_NORM}.running_{part}"].float() for part in ("mean", "var"))
        weight = weight / (variance + PROBE_EPS).sqrt()
        bias = bias - weight @ mean
    return linear(weight, bias)


def _is_linear(stored: dict[str, torch.Tensor], name: str) -> bool:
    weight, bias = stored.get(f"{name}.weight"), stored.get(f"{name}.bias")
    return weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """A linear layer (K, D) with these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.load_state_dict({"weight": weight.clone(), "bias": bias.clone()}, assign=True)
    return layer


def write_head(folder: Path, head: nn.Linear, classes: list[str], spec: BackboneSpec) -> None:
    """Beside an exported backbone: the head, and the names of its classes where they are known."""
    weights = {"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu()}
    write_safetensors(folder / HEAD_FILE, weights, spec, {"classes": classes})


def load_head(source: str | Path) -> tuple[nn.Linear, list[str]]:
    """The head that `write_head` put beside the exported backbone behind `source`, and its classes (none where unknown).

    UserError where there is none."""
    if (path := _head_file(source)) is None:
        raise UserError(
            f"{source} has no classifier",
            expected="a fine-tuned or linear-probe checkpoint with its head",
            fix="fine-tune with export_classifier=true, or evaluate this backbone by a protocol that trains a head",
        )
    file = read_file(path)
    return linear(file.content["weight"], file.content["bias"]), list(
        json.loads(file.metadata["provenance"])["classes"]
    )


def has_head(source: str | Path) -> bool:
    """Whether `load_head` finds one."""
    return _head_file(source) is not None


def _head_file(source: str | Path) -> Path | None:
    folder = Path(str(source).removeprefix("run:"))
    return next(
        (place / HEAD_FILE for place in (folder, folder / EXPORT) if (place / HEAD_FILE).is_file()), None
    )
