import io
import logging
import multiprocessing
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import BadImage, BadImages, decode
from mae_bench.errors import UserError


def jpeg(value=0, mode="RGB", size=(16, 12), form="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 100, 200)).convert(mode).save(file, form)
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    """Write the same images to folders (`train`) and to a tar (`packed.tar`, in another order)."""
    for number, name in enumerate(["b/2.JPEG", "b/1.JPEG", "a/3.jpg", "a-b/4.png"]):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    (tmp_path / "train" / "notes.txt").write_text("no image")
    with tarfile.open(tmp_path / "packed.tar", "w") as tar:
        for path in sorted((tmp_path / "train").rglob("*.*"), reverse=True):
            tar.add(path, path.relative_to(tmp_path / "train").as_posix())
    return tmp_path


def test_folder_and_tar_agree(root):
    folder, tar = open_images(root, "train"), open_images(root, "packed")
    assert folder.classes == tar.classes == ["a", "a-b", "b"]
    assert folder.targets.tolist() == tar.targets.tolist() == [0, 1, 2, 2]
    names = [folder.name(i) for i in range(len(folder))]
    assert names == [tar.name(i) for i in range(len(tar))] == ["a/3.jpg", "a-b/4.png", "b/1.JPEG", "b/2.JPEG"]
    assert [folder.read(i) for i in range(4)] == [tar.read(i) for i in range(4)]


def _send(images, queue):
    queue.put([images.read(i) for i in range(len(images))])


def test_a_tar_is_read_from_a_forked_process_and_from_a_copy(root):
    images = open_images(root, "packed")
    expected = [images.read(i) for i in range(4)]  # the parent's file is open now
    assert [pickle.loads(pickle.dumps(images)).read(i) for i in range(4)] == expected
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_send, args=(images, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()
    assert images.read(0) == expected[0]


def test_missing_and_empty_splits_are_named(root):
    with pytest.raises(UserError, match="val"):
        open_images(root, "val")
    (root / "val" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="no images"):
        open_images(root, "val")


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="train.tar"):
        open_images(tmp_path, "train")


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG")]
)
def test_every_mode_becomes_rgb(mode, form):
    image = decode(jpeg(50, mode, form=form))
    assert (image.mode, image.size) == ("RGB", (16, 12))


def test_pixels_are_those_of_the_file():
    assert np.asarray(decode(jpeg(7, form="PNG")))[0, 0].tolist() == [7, 100, 200]


@pytest.mark.parametrize("data", [b"", b"garbage", jpeg(size=(64, 64))[:-200], jpeg(form="PNG")[:40]])
def test_damaged_bytes_are_a_bad_image(data):
    with pytest.raises(BadImage):
        decode(data)


def test_bad_images_are_counted_once_and_logged(caplog):
    bad = BadImages(0.5, 4)
    assert bad.note() == ""
    with caplog.at_level(logging.WARNING):
        for name in ("a/1.jpg", "a/2.jpg", "a/1.jpg"):
            bad.add(name, "truncated")
    assert bad.count == 2
    assert bad.note() == "2 of 4 images did not decode: a/1.jpg, a/2.jpg"
    assert [record.getMessage().split()[1] for record in caplog.records] == ["a/1.jpg", "a/2.jpg"]


def test_the_limit_is_a_share_of_all_images():
    with pytest.raises(UserError, match="max_bad_images"):
        BadImages(0.001, 993).add("x", "truncated")
    at_limit = BadImages(0.001, 2000)
    at_limit.add("x", "truncated")
    at_limit.add("y", "truncated")
    with pytest.raises(UserError, match="3 of 2000"):
        at_limit.add("z", "truncated")
