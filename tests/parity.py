"""Compare a computation with its reference, in float64 by default.

Parity is a property of the code, not of a processor. In float32 two correct implementations of a small ViT
differ by about 1e-5, by how much depends on the vector instructions of the machine, and a tolerance that
covers all machines also covers some defects. In float64 they differ by about 1e-14, and any real defect is
above 1e-9.
"""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

# The tolerance where one side keeps a table in float32 (rotations, sums or resamplings of position rows) and
# all else is float64: one rounding of an entry reaches the tokens of a toy of two blocks about once, and
# eight are allowed.
FLOAT32_TABLES = 8 * torch.finfo(torch.float32).eps

# Rounding errors of a mean over a batch: torch sums in blocks, whose error grows with the logarithm of the
# number of terms.
MEAN = 64


def assert_parity(ours: Any, reference: Any, *, rtol: float = 1e-9, msg: str = "") -> None:
    """Assert that `ours` equals `reference` up to `rtol` times the largest magnitude of the reference.

    Both sides are float64 tensors, arrays or numbers. Raise TypeError for another type of number: give both
    sides the same float64 model, weights and inputs. Where a side exists in float32 only, use
    `assert_within_rounding`.
    """
    ours, reference = _as_tensor(ours), _as_tensor(reference)
    for side, tensor in (("ours", ours), ("reference", reference)):
        if tensor.dtype != torch.float64:
            raise TypeError(f"{side} is {tensor.dtype}: compare in float64, or use assert_within_rounding")
    _assert_close(ours, reference, rtol * _largest(reference), msg)


def assert_within_rounding(ours: Any, reference: Any, *, roundings: float, msg: str = "") -> None:
    """Assert that two results differ by no more than `roundings` rounding errors of their numbers.

    One rounding error is the machine epsilon of the less precise side, times the largest magnitude of the
    reference. State where the number of roundings comes from: n for a sum of n terms in any order, k for k
    operations in a row.
    """
    ours, reference = _as_tensor(ours), _as_tensor(reference)
    eps = max(torch.finfo(ours.dtype).eps, torch.finfo(reference.dtype).eps)
    _assert_close(ours.double(), reference.double(), roundings * eps * _largest(reference), msg)


def in_float64(model: Model) -> Model:
    """Return a copy of the model in float64, in evaluation mode."""
    model = copy.deepcopy(model).double()
    model.eval()  # in a line of its own: mmsegmentation's backbones return nothing
    return model


def weights_in_float64(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a copy of a state dict whose floating point tensors are float64."""
    return {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()
    }


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.ascontiguousarray(value))
    return torch.as_tensor(value).detach()


def _largest(reference: torch.Tensor) -> float:
    return reference.double().abs().max().item() if reference.numel() else 0.0


def _assert_close(ours: torch.Tensor, reference: torch.Tensor, atol: float, msg: str) -> None:
    describe = (lambda found: f"{msg}\n{found}") if msg else None
    torch.testing.assert_close(ours, reference, rtol=0, atol=atol, msg=describe)
