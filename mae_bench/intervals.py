"""Sample deviations and Student's 95 % intervals of differences, for a small number of seeds."""

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, variance

CONFIDENCE = 0.95
STEPS = 400  # of Simpson's rule: eight correct digits for the degrees of freedom of a few seeds


def sample_std(values: Sequence[float]) -> float | None:
    """Return the standard deviation with n - 1 in the denominator; None for a single value."""
    return math.sqrt(variance(values)) if len(values) > 1 else None


def mean_margin(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the mean of at least two values."""
    return student_quantile(len(values) - 1) * math.sqrt(variance(values) / len(values))


def paired_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `values - others`, for at least two pairs."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    error = math.sqrt(variance(differences) / len(differences))
    return _around(fmean(differences), error, len(differences) - 1)


def welch_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two means, at least two values each (Welch 1947)."""
    parts = [variance(sample) / len(sample) for sample in (values, others)]
    total = sum(parts)
    weights = sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, (values, others), strict=True))
    return _around(fmean(values) - fmean(others), math.sqrt(total), total**2 / weights if weights else 1)


def _around(center: float, error: float, freedom: float) -> tuple[float, float]:
    margin = student_quantile(freedom) * error
    return center - margin, center + margin


@cache
def student_quantile(freedom: float) -> float:
    """Return the t for which 95 % of Student's distribution is between -t and t.

    `freedom`, the degrees of freedom, is at least 1 and need not be an integer.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, freedom) < CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _central_probability(angle: float, freedom: float) -> float:
    """Return P(|t| < sqrt(freedom) tan(angle)) by Simpson's rule.

    With that substitution the density is cos(angle) ** (freedom - 1) up to a constant.
    """
    step = angle / STEPS
    weights = [1, *[4, 2] * (STEPS // 2 - 1), 4, 1]
    area: float = (
        sum(weight * math.cos(i * step) ** (freedom - 1) for i, weight in enumerate(weights)) * step / 3
    )
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 2 * constant * area
