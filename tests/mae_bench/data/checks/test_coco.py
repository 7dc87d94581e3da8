"""COCO data sets as people write them: each is read as it is meant, or refused with the file and the fix."""

from pathlib import Path

import pytest

from mae_bench.data.checks.layouts import check_layout
from mae_bench.errors import UserError
from tests.mae_bench.data.checks.coco_corpus import ACCEPTED, REFUSED, Variant, write


@pytest.mark.parametrize("variant", ACCEPTED, ids=lambda variant: variant.name)
def test_accepted(variant: Variant, tmp_path: Path) -> None:
    report = check_layout("coco", write(tmp_path / "set", variant))
    assert report.splits == {"train2017": 2, "val2017": 2}
    assert variant.note in "; ".join(report.notes)
    assert check_layout("coco", tmp_path / "set") == report, "from the cache"


@pytest.mark.parametrize("variant", REFUSED, ids=lambda variant: variant.name)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_layout("coco", write(tmp_path / "set", variant))
    error = caught.value
    place = "val2017" if variant.files is not Variant.files else "instances_train2017.json"
    for words in (*variant.refused, place):
        assert words in str(error)
    assert error.expected
    assert error.fix
