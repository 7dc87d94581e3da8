"""Derive every random draw from integers: one seed per step, epoch or image, the same on every machine."""

import hashlib
import random
import struct

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """Derive a 63-bit seed from integers, the same on every machine and in every process."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed torch, NumPy and random: augmentations draw from all three."""
    torch.default_generator.manual_seed(seed)
    # Before CUDA starts, torch.manual_seed would queue a call, with a stack trace, for its initialisation.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
