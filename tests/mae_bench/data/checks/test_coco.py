"""COCO data sets as people write them: each is read as it is meant, or refused with the file and the fix."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_bench.cli import data as commands
from mae_bench.data.checks import coco
from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.checks.run_lengths import decode_counts
from mae_bench.data.sets.index import try_to_cache
from mae_bench.errors import UserError
from tests.mae_bench.data.checks.coco_corpus import ACCEPTED, REFUSED, Variant, compress, write

VARIANTS = {variant.name: variant for variant in ACCEPTED}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write(tmp_path / "set", VARIANTS["as it is"])


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


def test_a_known_set_is_not_read_again(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = check_layout("coco", sound)

    def read(*_: Any) -> None:
        raise OSError("read again")

    monkeypatch.setattr(coco, "read_annotations", read)
    assert check_layout("coco", sound) == report
    with pytest.raises(UserError, match="read again"):
        check_layout("coco", sound, thorough=True)


def test_what_changed_is_checked_again(sound: Path) -> None:
    check_layout("coco", sound)
    Image.new("RGB", (9, 7)).save(sound / "val2017" / "000000000011.png")
    with pytest.raises(UserError, match=r"000000000011.png \(48 x 40, but the file has 9 x 7\)"):
        check_layout("coco", sound)


def test_a_damaged_cache_is_written_again(sound: Path, cache: Path) -> None:
    report = check_layout("coco", sound)
    entries = {path: path.read_bytes() for path in (cache / "coco").glob("*.json")}
    for path, content in entries.items():
        path.write_bytes(content.replace(b"png", b"jpg"))
    assert check_layout("coco", sound) == report
    assert {path: path.read_bytes() for path in entries} == entries


def test_a_cache_of_another_version_is_written_again(sound: Path, cache: Path) -> None:
    report = check_layout("coco", sound)
    entries = {path: path.read_bytes() for path in (cache / "coco").glob("*.json")}
    for path in entries:
        try_to_cache(path, b'{"digest": ""}')
    assert check_layout("coco", sound) == report
    assert {path: path.read_bytes() for path in entries} == entries


def test_an_image_that_does_not_open_is_left_to_training(sound: Path) -> None:
    (sound / "train2017" / "000000000001.png").write_bytes(b"no image")
    assert check_layout("coco", sound).notes == ()


@pytest.mark.parametrize(
    ("name", "ceiling"),
    [
        ("as it is", "val2017: a perfect detector scores 100.00 AP_box, 100.00 AP_mask"),
        (
            "an empty mask",
            "val2017: a perfect detector scores 100.00 AP_box, 62.62 AP_mask (masks without a pixel: 1)",
        ),
    ],
)
def test_the_command_states_the_ceiling(
    name: str, ceiling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is optional: make setup")
    commands.check("coco", str(write(tmp_path / "set", VARIANTS[name])))
    assert capsys.readouterr().out.splitlines()[-1] == ceiling


def test_without_pycocotools_the_command_says_what_is_left_out(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    commands.check("coco", str(sound))
    assert "pycocotools is not installed" in capsys.readouterr().out.splitlines()[-1]


def test_compressed_run_lengths_are_those_of_pycocotools() -> None:
    masks = pytest.importorskip("pycocotools.mask", reason="pycocotools is optional: make setup")
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 3), (300, 400), (2000, 1500)):
        mask = np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)
        mask[height // 3 : height // 2] = 1
        flat = mask.ravel(order="F").astype(np.int64)
        changes = np.flatnonzero(np.diff(flat, prepend=0))
        expected = np.diff(changes, prepend=0, append=flat.size)
        text = masks.encode(mask)["counts"].decode()
        np.testing.assert_array_equal(decode_counts(text), expected)
        assert compress(expected.tolist()) == text
