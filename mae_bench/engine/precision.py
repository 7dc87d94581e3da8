"""The numbers that training computes in: mixed precision, and algorithms that repeat bit for bit."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


def autocast(device: torch.device, amp_dtype: str) -> AbstractContextManager[Any]:
    """Mixed precision in `amp_dtype`; float32 computes as it is."""
    return torch.autocast(device.type, getattr(torch, amp_dtype), enabled=amp_dtype != "float32")


def grad_scaler(device: torch.device, amp_dtype: str) -> torch.amp.GradScaler:
    """Loss scaling for float16, a no-op for the rest. An overflow in one shard of a DTensor counts on every process."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype == "float16")


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Inside, only algorithms run that repeat bit for bit; torch raises RuntimeError for an operation that has none."""
    if not enabled:
        yield
        return
    cudnn, variable = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    flags, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(variable)
    os.environ[variable] = workspace or ":4096:8"  # one of the two values with which cuBLAS repeats
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags
        if workspace is None:
            del os.environ[variable]
