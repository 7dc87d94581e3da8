"""Hugging Face sets written by save_to_disk or downloaded: Arrow is read in place, Parquet unpacked once."""

import builtins
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.sets.index import cache_folder
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import NotInstalled, UserError

pa = pytest.importorskip("pyarrow", reason="pyarrow, for Arrow and Parquet sets, is not installed")
pq = pytest.importorskip("pyarrow.parquet")

Picture = Callable[..., bytes]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}


def table(numbers: range, picture: Picture, features: dict[str, Any] | None = FEATURES, **more: Any) -> Any:
    """Return rows as the datasets library writes them, with the features in the metadata."""
    images = [{"bytes": picture(n), "path": f"{n}.jpg" if n % 2 else None} for n in numbers]
    columns = {
        "image": pa.array(images, IMAGE),
        "label": pa.array([n % 2 for n in numbers], pa.int64()),
    } | more
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else None
    return pa.table(columns).replace_schema_metadata(metadata)


def save_to_disk(folder: Path, rows: Any, num_files: int = 2, batch: int = 2, **options: Any) -> None:
    """Write the layout of `Dataset.save_to_disk`: data-*.arrow (streaming), state.json, dataset_info.json."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{num_files:05}.arrow" for i in range(num_files)]
    step = -(-len(rows) // num_files)
    for i, name in enumerate(names):
        with pa.ipc.new_stream(
            folder / name, rows.schema, options=pa.ipc.IpcWriteOptions(**options)
        ) as stream:
            stream.write_table(rows.slice(i * step, step), max_chunksize=batch)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_indices_data_files": None,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))


def contents(images: ImageSource) -> list[tuple[bytes, str]]:
    return [(images.read(i), images.classes[images.targets[i]]) for i in range(len(images))]


def expected(numbers: range, picture: Picture) -> list[tuple[bytes, str]]:
    return [(picture(n), ("ant", "bee")[n % 2]) for n in numbers]


@pytest.fixture
def saved(tmp_path: Path, picture: Picture) -> Path:
    root = tmp_path / "set"
    save_to_disk(root / "train", table(range(7), picture))
    save_to_disk(root / "validation", table(range(7, 10), picture), num_files=1)
    (root / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    return root


def test_a_saved_set_is_read_in_place(saved: Path, picture: Picture) -> None:
    images = open_images(saved, "train")
    assert contents(images) == expected(range(7), picture)
    assert contents(open_images(saved, "val")) == expected(range(7, 10), picture)
    assert [images.name(i) for i in (0, 1, 4)] == [
        "data-00000-of-00002.arrow:0",
        "data-00000-of-00002.arrow:1:1.jpg",
        "data-00001-of-00002.arrow:0",
    ]
    report = check_layout("imagenet", saved)
    assert (report.splits, report.classes) == ({"train": 7, "val": 3}, ("ant", "bee"))


@pytest.mark.usefixtures("keeps")
def test_once_indexed_it_needs_no_pyarrow(
    saved: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_images(saved, "train")
    monkeypatch.setattr(
        "mae_bench.data.sets.arrow._import_pyarrow", lambda: pytest.fail("pyarrow is asked for")
    )
    images = open_images(saved, "train")
    assert len(pickle.dumps(images)) < 3000
    assert contents(pickle.loads(pickle.dumps(images))) == expected(range(7), picture)


def test_a_single_set_is_train(saved: Path, picture: Picture) -> None:
    assert contents(open_images(saved / "train", "train")) == expected(range(7), picture)
    assert check_layout("images", saved / "train").splits == {"train": 7}


def test_the_file_format_and_the_cache_of_the_library(tmp_path: Path, picture: Picture) -> None:
    rows = table(range(3), picture)
    with pa.ipc.new_file(tmp_path / "toy-train-00000-of-00001.arrow", rows.schema) as file:
        file.write_table(rows)
    assert contents(open_images(tmp_path, "train")) == expected(range(3), picture)


@pytest.mark.parametrize(
    "inside", ["data/train-00000-of-00002.parquet", "train-0.parquet", "train/0000.parquet"]
)
def test_parquet_is_unpacked_once(
    tmp_path: Path, picture: Picture, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(range(5), picture), path, row_group_size=2)
    second = path.with_name(
        path.name.replace("00000-of", "00001-of").replace("train-0.", "train-1.").replace("0000.", "0001.")
    )
    if second != path:
        pq.write_table(table(range(5, 8), picture), second, row_group_size=2)
    images = open_images(tmp_path, "train")
    assert contents(images) == expected(range(8), picture)
    assert images.name(1) == f"{path.name}:1:1.jpg"
    assert images.name(6) == f"{second.name}:1"
    monkeypatch.setattr("mae_bench.data.sets.packing._encode", lambda *_: pytest.fail("it is unpacked again"))
    assert contents(open_images(tmp_path, "train")) == expected(range(8), picture)


def test_parquet_that_changed_is_unpacked_again(tmp_path: Path, picture: Picture) -> None:
    pq.write_table(table(range(5), picture), tmp_path / "train.parquet")
    assert len(open_images(tmp_path, "train")) == 5
    pq.write_table(table(range(6), picture), tmp_path / "train.parquet")
    assert contents(open_images(tmp_path, "train")) == expected(range(6), picture)


def test_parquet_of_the_same_size_is_unpacked_again(tmp_path: Path, picture: Picture) -> None:
    for number in (1, 2):
        rows = table(range(2), lambda n, number=number: picture(0) + bytes([number] * 4))
        pq.write_table(rows, tmp_path / "train.parquet", compression="none", use_dictionary=False)
        os.utime(tmp_path / "train.parquet", (number, number))
        assert open_images(tmp_path, "train").read(0) == picture(0) + bytes([number] * 4)


@pytest.mark.parametrize("name", ["packed.json", "all.index", "all.data"])
def test_a_damaged_copy_in_the_cache_is_unpacked_again(tmp_path: Path, picture: Picture, name: str) -> None:
    pq.write_table(table(range(5), picture), tmp_path / "train.parquet")
    open_images(tmp_path, "train")
    (damaged,) = cache_folder().glob(f"unpacked/*/{name}")
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert contents(open_images(tmp_path, "train")) == expected(range(5), picture)


def test_plain_bytes_and_labels_of_every_kind(tmp_path: Path, picture: Picture) -> None:
    kinds: dict[str, tuple[Any, list[str]]] = {
        "none": (None, [""]),
        "integers": (pa.array([2, 0], pa.int32()), ["0", "1", "2"]),
        "texts": (pa.array(["b", "a"]), ["a", "b"]),
        "kept_back": (pa.array([-1, -1]), [""]),
    }
    for name, (labels, classes) in kinds.items():
        columns = {"image": pa.array([picture(1), picture(2)], pa.large_binary())} | (
            {"label": labels} if labels else {}
        )
        save_to_disk(tmp_path / name / "train", pa.table(columns), num_files=1)
        (tmp_path / name / "train" / "dataset_info.json").write_text("{}")
        images = open_images(tmp_path / name, "train")
        assert images.classes == classes, name
        assert [images.read(0), images.read(1)] == [picture(1), picture(2)]


def test_an_image_that_is_missing_is_a_bad_one(tmp_path: Path, picture: Picture) -> None:
    rows = pa.table(
        {"image": pa.array([{"bytes": None, "path": "x.jpg"}, {"bytes": picture(1), "path": None}], IMAGE)}
    )
    save_to_disk(tmp_path / "train", rows, num_files=1)
    images = open_images(tmp_path, "train")
    assert [images.read(0), images.read(1)] == [b"", picture(1)]


def damage(saved: Path, change: str, picture: Picture) -> None:
    folder, file = saved / "train", saved / "train" / "data-00001-of-00002.arrow"
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-3000])
    elif change == "garbage":
        file.write_bytes(b"no arrow" * 100)
    elif change == "gone":
        file.unlink()
    elif change == "state":
        (folder / "state.json").write_text("{")
    else:
        shutil.rmtree(folder)
        rows = {
            "paths": pa.table({"image": pa.array([{"bytes": None, "path": "a.jpg"}], IMAGE)}),
            "columns": pa.table({"text": ["a"]}),
            "labels": table(range(2), picture, label=pa.array([0, 5])),
            "fractions": table(range(2), picture, label=pa.array([0.5, 1.0])),
            "compressed": table(range(2), picture),
            "indices": table(range(2), picture),
        }[change]
        options: dict[str, Any] = {"compression": "zstd"} if change == "compressed" else {}
        save_to_disk(folder, rows, num_files=1, **options)
        if change == "indices":
            state = json.loads((folder / "state.json").read_text()) | {
                "_indices_data_files": [{"filename": "indices.arrow"}]
            }
            (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("cut", "00001-of-00002.arrow cannot be read as an Arrow file|ends"),
        ("garbage", "00001-of-00002.arrow cannot be read as an Arrow file"),
        ("gone", "00001-of-00002.arrow is missing"),
        ("state", "state.json"),
        ("paths", "paths of images"),
        ("columns", "no image column; found: text"),
        ("labels", "labels from 0 to 5"),
        ("fractions", "label contains float"),
        ("compressed", "is compressed"),
        ("indices", "flatten_indices"),
    ],
)
def test_what_is_wrong_with_a_set_is_named(saved: Path, picture: Picture, change: str, words: str) -> None:
    damage(saved, change, picture)
    with pytest.raises(UserError, match=words):
        open_images(saved, "train")


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a Parquet file"):
        open_images(tmp_path, "train")


def test_without_pyarrow_the_command_is_given(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError("No module named 'pyarrow'")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(NotInstalled, match=r"mae_bench\[arrow\]"):
        open_images(saved, "train")
