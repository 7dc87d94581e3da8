"""Derive every random draw from integers: one seed per step, epoch or image, the same on every machine."""

import hashlib
import random
import struct

import numpy as np
import torch


def seed_of(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every machine and for every process."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seeds torch, numpy and random: augmentations draw from all three."""
    torch.default_generator.manual_seed(seed)
    if (
        torch.cuda.is_initialized()
    ):  # torch.manual_seed would queue a call, with a stack trace, for the day CUDA starts
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
