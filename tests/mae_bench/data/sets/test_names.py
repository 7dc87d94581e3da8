"""Names of files that are not UTF-8 are escaped in all that is shown or written."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.checks.verify import find_bad_images
from mae_bench.data.pack import pack_set
from mae_bench.data.sets.open import open_images
from mae_bench.files import json_digest, write_json
from mae_bench.seal import read_sealed_json, seal_json

CLASS, SHOWN = b"abeill\xe9", r"abeill\xe9"  # Latin-1


@pytest.fixture
def root(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """Return class folders with names in Latin-1 and an image that does not decode."""
    for split in ("train", "val"):
        for name in (CLASS, b"bee"):
            folder = os.path.join(os.fsencode(tmp_path / "set" / split), name)
            os.makedirs(folder)
            for number in range(2):
                with open(os.path.join(folder, b"\xff%d.jpg" % number), "wb") as file:
                    file.write(picture(number))
    with open(os.path.join(os.fsencode(tmp_path / "set" / "train"), CLASS, b"\xff1.jpg"), "wb") as file:
        file.write(b"no image")
    return tmp_path / "set"


@pytest.mark.usefixtures("keeps")
def test_names_are_escaped_and_images_found(
    root: Path, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    report = check_layout("imagenet", root)
    assert report.classes == (SHOWN, "bee")
    for _ in range(2):  # the second time from the cache
        images = pickle.loads(pickle.dumps(open_images(root, "train")))
        assert [images.name(i) for i in (0, 3)] == [rf"{SHOWN}/\xff0.jpg", r"bee/\xff1.jpg"]
        assert [images.read(i) for i in (0, 3)] == [picture(0), picture(1)]
        assert list(find_bad_images(images, 0)) == [rf"{SHOWN}/\xff1.jpg"]
        write_json(tmp_path / "classes.json", images.classes)
    header = pack_set(root, tmp_path / "packed")
    assert header["splits"]["train"]["left_out"][0][0] == rf"{SHOWN}/\xff1.jpg"
    packed = open_images(tmp_path / "packed", "train")
    assert packed.classes == [SHOWN, "bee"]
    assert [packed.read(i) for i in (0, 2)] == [picture(0), picture(1)]


def test_the_command_prints_them(root: Path) -> None:
    command = [sys.executable, "-m", "mae_bench", "data", "check", "images", str(root), "--decode"]
    for options in ([], ["--json"]):
        done = subprocess.run([*command, *options], capture_output=True, check=False, text=True)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        bad = rf"{SHOWN}/\xff1.jpg"
        if options:
            assert list(json.loads(done.stdout)["bad_images"]["train"]) == [bad]
        else:
            assert f"train: {bad} does not decode: not an image format" in done.stdout


def test_paths_that_are_not_utf_8_are_written_and_sealed(tmp_path: Path) -> None:
    value = {"path": os.fsdecode(b"/data/\xff.tar")}
    write_json(tmp_path / "sealed.json", seal_json(value))
    assert read_sealed_json(tmp_path / "sealed.json") == value
    assert json_digest(value) != json_digest({"path": r"/data/\udcff.tar"})
