"""Damage small image sets of every form and report how each is read: a line of JSON per damaged file.

`python -m tests.mae_bench.data.sets.mutants NUMBER SEED [FORM ...]` runs in a process of its own, which a
crash of a decoder ends.
"""

import io
import json
import os
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.checks.verify import find_bad_images
from mae_bench.data.pack import pack_set
from mae_bench.data.sets.decode import decode_pixels
from mae_bench.data.sets.open import open_images
from mae_bench.errors import UserError

NUM_IMAGES = 4
NAMES = ("ant", "bee")
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(NAMES)}}


def encode(number: int, form: str = "PNG", dtype: str = "uint8", **options: Any) -> bytes:
    """Return an image file that differs by its number."""
    draw, file = np.random.default_rng(number), io.BytesIO()
    shape = (6, 5) if dtype == "uint16" else (6, 5, 3)
    pixels = draw.integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    if form == "NPY":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def write_files(folder: Path) -> None:
    for number in range(NUM_IMAGES):
        path = folder / NAMES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))


def make_table(**columns: Any) -> Any:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": encode(n), "path": f"{n}.png" if n % 2 else None} for n in range(NUM_IMAGES)]
    labels = [n % 2 for n in range(NUM_IMAGES)]
    return pa.table({"image": pa.array(images, kind), "label": labels} | columns)


def write_stream(path: Path, declared: bool = True) -> Path:
    path.parent.mkdir(exist_ok=True)
    metadata = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()} if declared else None
    rows = make_table().replace_schema_metadata(metadata)
    with pa.ipc.new_stream(path, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=2)
    return path


def write_arrow_file(root: Path) -> Path:
    images = pa.array([encode(n) for n in range(NUM_IMAGES)], pa.large_binary())
    rows = make_table(image=images, label=pa.array(["b", "a"] * 2).dictionary_encode())
    with pa.ipc.new_file(root / "set-train.arrow", rows.schema) as file:
        file.write_table(rows, max_chunksize=2)
    return root / "set-train.arrow"


def write_state(root: Path) -> Path:
    write_stream(root / "train" / "data.arrow")
    path = root / "train" / "state.json"
    path.write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": None}))
    return path


def write_info(root: Path) -> Path:
    write_stream(root / "train" / "data.arrow", declared=False)
    path = root / "train" / "dataset_info.json"
    path.write_text(json.dumps({"features": FEATURES}))
    return path


def write_parquet(root: Path, **options: Any) -> Path:
    pq.write_table(make_table(), root / "train.parquet", row_group_size=2, **options)
    return root / "train.parquet"


def write_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shard(root: Path) -> Path:
    members: dict[str, bytes] = {}
    for n in range(NUM_IMAGES):
        members |= {f"{'é' * 60}{n}.png": encode(n), f"{'é' * 60}{n}.json": b'{"label": %d}' % (n % 2)}
    return write_tar(root / "train-0.tar", members, tarfile.PAX_FORMAT)


def write_class_tar(root: Path) -> Path:
    members = {f"{NAMES[n % 2]}/{n}.png": encode(n) for n in range(NUM_IMAGES)}
    return write_tar(root / "train.tar", members)


def write_packed(root: Path, name: str) -> Path:
    with TemporaryDirectory() as folder:
        write_files(Path(folder, "train"))
        pack_set(folder, root)
    return root / name


def write_inaturalist(root: Path) -> Path:
    write_files(root / "train_val2018")
    images = [{"id": n, "file_name": f"train_val2018/{NAMES[n % 2]}/{n}.png"} for n in range(NUM_IMAGES)]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    annotations = [{"image_id": n, "category_id": n % 2} for n in range(NUM_IMAGES)]
    path = root / "train2018.json"
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return path


def write_places(root: Path) -> Path:
    write_files(root / "images256")
    path = root / "train_places205.csv"
    path.write_text("".join(f"{NAMES[n % 2]}/{n}.png {n % 2}\n" for n in range(NUM_IMAGES)))
    return path


def write_name(root: Path) -> Path:
    write_files(root / "train")
    (root / "dataset.json").write_text('{"name": "mine"}')
    return root / "dataset.json"


def write_image(root: Path, *args: Any, **options: Any) -> Path:
    (root / "train").mkdir()
    (root / "train" / "0.png").write_bytes(encode(0, *args, **options))
    return root / "train" / "0.png"


FORMS: dict[str, Callable[[Path], Path]] = {
    "arrow-stream": lambda root: write_stream(root / "set-train.arrow"),
    "arrow-file": write_arrow_file,
    "arrow-state": write_state,
    "arrow-info": write_info,
    "parquet": write_parquet,
    "parquet-checksums": lambda root: write_parquet(root, compression="none", write_page_checksum=True),
    "class-tar": write_class_tar,
    "shard": write_shard,
    "packed-header": lambda root: write_packed(root, "packed.json"),
    "packed-index": lambda root: write_packed(root, "train.index"),
    "packed-data": lambda root: write_packed(root, "train.data"),
    "packed-checksums": lambda root: write_packed(root, "train.checksums"),
    "inaturalist": write_inaturalist,
    "places": write_places,
    "dataset-name": write_name,
    "png": write_image,
    "png-palette": lambda root: write_image(root, "GIF"),
    "jpeg": lambda root: write_image(root, "JPEG"),
    "tiff-16": lambda root: write_image(root, "TIFF", "uint16"),
    "tiff-lzw": lambda root: write_image(root, "TIFF", compression="tiff_lzw"),
    "webp": lambda root: write_image(root, "WEBP"),
    "bmp": lambda root: write_image(root, "BMP"),
    "npy": lambda root: write_image(root, "NPY"),
}
SEALED = ("packed-header", "packed-index", "packed-data", "packed-checksums")


def mutate(data: bytes, draw: np.random.Generator) -> bytes:
    """Cut the data, overwrite or insert a few bytes, or flip a few bits."""
    found, way, at = bytearray(data), draw.integers(4), int(draw.integers(len(data)))
    length = int(draw.integers(1, 16))
    if way == 0:
        return data[:at]
    if way == 1:
        found[at : at + length] = draw.bytes(int(draw.integers(1, 16)))
    elif way == 2:
        found[at : at + length] = (b"\xff", b"\0")[draw.integers(2)] * length
    else:
        for place in draw.integers(len(data), size=3).tolist():
            found[place] ^= 1 << int(draw.integers(8))
    return bytes(found)


def read(root: Path) -> Any:
    """Return names, classes, labels and pixels of the training images, with None for those that are bad."""
    check_layout("images", root, thorough=True)
    images = open_images(root, "train")
    bad = find_bad_images(images, 0)
    rows = []
    for i in range(len(images)):
        name = images.name(i)
        pixels = None if name in bad else decode_pixels(images.read(i)).tobytes()
        rows.append((name, images.classes[images.targets[i]], pixels))
    return rows


def judge(root: Path, intact: Any) -> str:
    """Return "same", "refused", "bad image" or "other content", or the exception that no user should see."""
    try:
        found = read(root)
    except UserError:
        return "refused"
    except Exception as error:  # noqa: BLE001 - the test fails on it
        return f"{type(error).__name__}: {error}"
    if found == intact:
        return "same"
    return "bad image" if any(pixels is None for _, _, pixels in found) else "other content"


def main(number: int, seed: int, forms: list[str]) -> None:
    warnings.simplefilter("ignore")
    for form in forms or FORMS:
        with TemporaryDirectory() as folder:
            root = Path(folder, "set")
            root.mkdir()
            path = FORMS[form](root)
            data, intact, draw = path.read_bytes(), read(root), np.random.default_rng(seed)
            for i in range(number):
                path.write_bytes(mutate(data, draw))
                os.environ["MAE_BENCH_CACHE"] = f"{folder}/cache-{i}"  # of this file alone
                print(json.dumps([form, judge(root, intact)]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
