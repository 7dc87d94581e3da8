"""Learning-rate schedule: linear warm-up, then half a cosine."""

import math


def cosine_lr(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Return the lr at a fractional epoch (paper A.1; facebookresearch/mae util/lr_sched.py).

    It rises from 0 to `lr` over the warm-up, then falls to `min_lr` at `epochs`.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    done = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def absolute_lr(base_lr: float, global_batch_size: int) -> float:
    """Return lr = base_lr x global_batch_size / 256 (linear scaling rule, paper A.1)."""
    return base_lr * global_batch_size / 256
