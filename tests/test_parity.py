"""The parity helper refuses float32, accepts rounding and rejects anything larger."""

import numpy as np
import pytest
import torch

from tests.parity import assert_parity, assert_within_rounding

NUMBERS = torch.tensor([1.0, -300.0, 0.0], dtype=torch.float64)


def test_float32_is_refused():
    for ours, reference in ((NUMBERS.float(), NUMBERS), (NUMBERS, NUMBERS.float())):
        with pytest.raises(TypeError, match="compare in float64"):
            assert_parity(ours, reference)


@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.Tensor.numpy, lambda t: np.float64(t[1])])
def test_rounding_is_accepted_and_a_difference_is_not(kind):
    assert_parity(kind(NUMBERS * (1 + 1e-14)), kind(NUMBERS))
    with pytest.raises(AssertionError):
        assert_parity(kind(NUMBERS * (1 + 1e-8)), kind(NUMBERS))


def test_not_a_number_and_another_shape_are_differences():
    with pytest.raises(AssertionError):
        assert_parity(NUMBERS * float("nan"), NUMBERS)
    with pytest.raises(AssertionError):
        assert_parity(NUMBERS[None], NUMBERS)


def test_float32_is_allowed_its_roundings():
    eps = torch.finfo(torch.float32).eps
    assert_within_rounding((NUMBERS * (1 + eps)).float(), NUMBERS, roundings=2)
    with pytest.raises(AssertionError, match="scale"):
        assert_within_rounding((NUMBERS * (1 + 4 * eps)).float(), NUMBERS, roundings=2, msg="scale")
