"""Rows of checkpoints: names from files and folders, patterns of paths, YAML lists, and their errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from mae_bench.errors import UserError
from mae_bench.suite.rows import rows_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ckpts/{a,b}.pth and ckpts/c/model.safetensors, from where the tests look."""
    (tmp_path / "ckpts" / "c").mkdir(parents=True)
    for name in ("b.pth", "a.pth", "c/model.safetensors"):
        (tmp_path / "ckpts" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_list_whose_aliases_stand_for_too_much_is_refused(folder: Path) -> None:
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 30)]
    (folder / "list.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="list.yaml is not YAML: its aliases"):
        rows_of(["list.yaml"])


def sources(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["source"] for name, row in rows.items()}


def test_checkpoints_are_named_after_their_files() -> None:
    given = [
        "a/mae_vit_base.pth",
        "timm:vit_tiny",
        "runs/demo/cells/mae/backbone-s0-12ab/export",
        "file:b/mae_vit_base.pth",
    ]
    assert sources(rows_of(given)) == {
        "mae_vit_base": given[0],
        "vit_tiny": given[1],
        "mae": given[2],
        "mae_vit_base-4": given[3],
    }


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:org/vit-1.5@0a1b2c", "vit-1_5"),
        ("timm:vit_small_patch16_224.dino", "vit_small_patch16_224_dino"),
        ("official:mae_vit_base", "mae_vit_base"),
        ("out/dino/checkpoint.pth", "dino"),
        ("run:runs/x/cells/mine/backbone-s0-0a1b", "mine"),
    ],
)
def test_a_name_is_the_most_telling_part(source: str, name: str) -> None:
    assert list(rows_of([source])) == [name]


def test_a_pattern_is_all_that_it_matches(folder: Path) -> None:
    assert sources(rows_of(["ckpts/*.pth", "timm:x"])) == {
        "a": "ckpts/a.pth",
        "b": "ckpts/b.pth",
        "x": "timm:x",
    }
    assert sources(rows_of(["file:ckpts/**/*.safetensors"])) == {"c": "file:ckpts/c/model.safetensors"}
    (folder / "ckpts" / "a[1].pth").touch()
    assert sources(rows_of(["ckpts/a[1].pth"])) == {"a[1]": "ckpts/a[1].pth"}, "a file of that very name"


def test_options_hold_for_what_is_given_on_the_command_line(folder: Path) -> None:
    (folder / "list.yaml").write_text(json.dumps([{"source": "ckpts/b.pth", "weights": "student"}]))
    rows = rows_of(["ckpts/a.pth", "list.yaml"], {"weights": "teacher"})
    assert rows == {
        "a": {"kind": "checkpoint", "source": "ckpts/a.pth", "weights": "teacher"},
        "b": {"kind": "checkpoint", "source": "ckpts/b.pth", "weights": "student"},
    }


def test_a_list_has_everything_that_a_row_needs(folder: Path) -> None:
    row = {
        "name": "mine",
        "source": "ckpts/a.pth",
        "format": "dino",
        "sha256": "0" * 64,
        "spec": {"num_heads": 3},
    }
    (folder / "list.yaml").write_text(
        json.dumps([row, "timm:vit_tiny", {"source": "ckpts/*.pth", "format": "timm"}])
    )
    rows = rows_of(["list.yaml", "ckpts/a.pth"])
    assert list(rows) == ["mine", "vit_tiny", "a", "b", "a-5"]
    assert rows["mine"] == {"kind": "checkpoint"} | {
        key: value for key, value in row.items() if key != "name"
    }
    assert rows["b"] == {"kind": "checkpoint", "source": "ckpts/b.pth", "format": "timm"}


def test_a_given_name_is_kept_for_its_row(folder: Path) -> None:
    (folder / "list.yaml").write_text(
        json.dumps([{"source": "ckpts/a.pth"}, {"source": "ckpts/b.pth", "name": "a"}])
    )
    assert sources(rows_of(["list.yaml"])) == {"a-1": "ckpts/a.pth", "a": "ckpts/b.pth"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "list.yaml is missing"),
        ("{", "is not YAML"),
        ("a: 1", "holds a dict of 1"),
        ("[]", "holds a list of 0"),
        ("[3]", "row 1 is 3"),
        ("[{name: x}]", "row 1 is {'name': 'x'}"),
        ("[{source: [1]}]", "row 1 is"),
        ("[{source: x.pth, name: a/b}]", "called 'a/b'"),
        ("[{source: x.pth, name: 3}]", "called 3"),
        ("[{source: x.pth, name: a}, {source: y.pth, name: a}]", "two checkpoints are called a"),
        ("[{source: 'no/*.pth'}]", "no/\\*.pth matches nothing"),
    ],
)
def test_a_list_that_is_none_says_why(folder: Path, content: str | None, told: str) -> None:
    if content is not None:
        (folder / "list.yaml").write_text(content)
    with pytest.raises(UserError, match=told):
        rows_of(["list.yaml"])
