"""Known answers of the statistics."""

import math

import pytest

from mae_bench.intervals import paired_interval, sample_std, student_quantile, welch_interval


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (9, 2.26216),
        (30, 2.04227),
        (120, 1.97993),
        (1e5, 1.95999),
    ],
)
def test_student_quantile_matches_the_printed_table(freedom: float, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, rel=2e-5)


def test_student_quantile_of_fractional_freedom_lies_between_its_neighbours() -> None:
    assert student_quantile(3) < student_quantile(2.5) < student_quantile(2)


def test_std_has_n_minus_1_and_is_absent_for_one_value() -> None:
    assert sample_std([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert sample_std([5.0]) is None


def test_paired_interval_by_hand() -> None:
    # differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3), t(2) = 4.30265
    low, high = paired_interval([11, 22, 33], [10, 20, 30])
    assert (low, high) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-4)


def test_welch_interval_by_hand() -> None:
    # variances 1 and 4 over n = 3: error^2 = 5/3, freedom = (5/3)^2 / ((1/3)^2/2 + (4/3)^2/2) = 50/17
    low, high = welch_interval([1, 2, 3], [10, 12, 14])
    margin = student_quantile(50 / 17) * math.sqrt(5 / 3)
    assert (low, high) == pytest.approx((-10 - margin, -10 + margin))
    assert student_quantile(50 / 17) == pytest.approx(
        3.2195, abs=2e-3
    )  # between t(2) and t(3), close to t(3)


def test_identical_seeds_give_an_interval_of_no_width() -> None:
    assert welch_interval([2, 2], [1, 1, 1]) == paired_interval([2, 2], [1, 1]) == (1, 1)
