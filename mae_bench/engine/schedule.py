"""The learning rate of every step: linear warm-up, then half a cosine."""

import math


def cosine_lr(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """lr at a fractional epoch: from 0 to `lr` over the warm-up, then down to `min_lr` at `epochs` (paper A.1;
    util/lr_sched.py)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    done = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def absolute_lr(base_lr: float, global_batch_size: int) -> float:
    """lr = base_lr x global_batch_size / 256 (the linear scaling rule, paper A.1)."""
    return base_lr * global_batch_size / 256
