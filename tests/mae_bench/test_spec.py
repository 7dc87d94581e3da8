"""BackboneSpec: round trip, and the contradictions that it refuses."""

import json
from typing import Any

import pytest

from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec

VALUES: dict[str, Any] = {
    "arch": "vit",
    "img_size": (32, 48),
    "patch_size": (8, 16),
    "in_chans": 3,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
}


def test_it_survives_json() -> None:
    spec = BackboneSpec(**VALUES, pretrain_method="mae")
    assert BackboneSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_grid_is_rows_by_columns() -> None:
    spec = BackboneSpec(**VALUES)
    assert spec.grid_size == (4, 3)
    assert spec.num_patches == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": (30, 48)}, r"use img_size \(32, 48\)"),
        ({"num_heads": 5}, "not divisible by num_heads"),
        ({"in_chans": 4}, "mean has 3 and std 3 values, in_chans is 4"),
        ({"mean": (0.5,)}, "mean has 1"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"patch_size": (0, 16)}, "patch_size"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BackboneSpec(**VALUES | change)


@pytest.mark.parametrize(
    ("change", "message"), [({"width": 3}, "unknown fields.*width"), ({"depth": None}, "incomplete")]
)
def test_what_is_no_spec_is_refused(change: dict[str, Any], message: str) -> None:
    value = {
        key: item for key, item in (BackboneSpec(**VALUES).to_dict() | change).items() if item is not None
    }
    with pytest.raises(UserError, match=message):
        BackboneSpec.from_dict(value)
