"""Numerics of training: mixed precision, loss scaling and deterministic algorithms."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


def autocast(device: torch.device, amp_dtype: str) -> AbstractContextManager[Any]:
    """Return a context for mixed precision in `amp_dtype`; disabled for float32."""
    return torch.autocast(device.type, getattr(torch, amp_dtype), enabled=amp_dtype != "float32")


def build_grad_scaler(device: torch.device, amp_dtype: str) -> torch.amp.GradScaler:
    """Build the loss scaler: enabled for float16, a no-op for other dtypes.

    An overflow in one shard of a DTensor is seen by every process.
    """
    return torch.amp.GradScaler(device.type, enabled=amp_dtype == "float16")


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Run only algorithms that are reproducible bit for bit, if enabled.

    torch raises RuntimeError for an operation without one.
    """
    if not enabled:
        yield
        return
    cudnn, variable = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    was_enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(variable)
    os.environ[variable] = workspace or ":4096:8"  # one of the two values for which cuBLAS is deterministic
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = flags
        if workspace is None:
            del os.environ[variable]
