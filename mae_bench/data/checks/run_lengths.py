"""Read the compressed run lengths of COCO's masks."""

import numpy as np

BITS = 5  # of a number in each character; one more bit tells whether the number goes on
MORE, SIGN = 1 << BITS, 1 << (BITS - 1)
LONGEST = 7  # characters of a number: 35 bits, as a difference of two 32-bit lengths has 33


def decode_counts(text: str) -> np.ndarray:
    """Return the run lengths, int64, of COCO's compressed `counts`; raise ValueError for any other text.

    As rleFrString of cocoapi's maskApi.c: each number is written in groups of 5 bits from the lowest on, as
    characters from "0" on; from the fourth number on, the difference to the last but one is stored.
    """
    codes = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) - ord("0")
    is_last = codes & MORE == 0
    if not len(codes) or codes.min() < 0 or codes.max() >= 2 * MORE or not is_last[-1]:
        raise ValueError("not compressed run lengths")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST:
        raise ValueError("a run length of more than 32 bits")
    shifts = BITS * (np.arange(len(codes)) - np.repeat(starts, lengths))
    counts = np.add.reduceat((codes & (MORE - 1)) << shifts, starts)
    counts = np.where(codes[ends] & SIGN, counts - (1 << BITS * lengths), counts)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts
