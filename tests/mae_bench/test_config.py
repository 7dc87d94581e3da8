"""YAML with bases, references and overrides; errors that name the nearest key."""

import os
from pathlib import Path
from typing import Literal

import pytest

from mae_bench.config import (
    Config,
    build,
    expand_variables,
    find_variants,
    load_yaml,
    resolve,
    resolve_path,
    task_file,
)
from mae_bench.errors import UserError


class Inner(Config):
    width: int = 3
    depth: int


class Outer(Config):
    inner: Inner
    other: Inner | None = None
    mode: Literal["a", "b"] = "a"
    lr: float = 0.1


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_base_is_merged_under_its_siblings_at_any_depth(tmp_path: Path) -> None:
    write(
        tmp_path,
        low="a: 1\nb: {c: 2, d: 3}",
        high="base: low.yaml\nb: {c: 20}\njobs:\n  x: {base: low.yaml, a: 7}",
    )
    assert load_yaml(tmp_path / "high.yaml") == {
        "a": 1,
        "b": {"c": 20, "d": 3},
        "jobs": {"x": {"a": 7, "b": {"c": 2, "d": 3}}},
    }


def test_a_base_is_looked_for_beside_its_file_then_in_the_package(tmp_path: Path) -> None:
    write(tmp_path, own="base: models/vit_demo.yaml")
    assert load_yaml(tmp_path / "own.yaml") == load_yaml("models/vit_demo.yaml")


def test_a_mapping_named_base_is_no_file(tmp_path: Path) -> None:
    assert resolve({"rows": {"base": {"a": 1}}}, tmp_path) == {"rows": {"base": {"a": 1}}}


def test_overrides_win_and_references_see_them(tmp_path: Path) -> None:
    write(tmp_path, one="root: x\npath: ${root}/y\nseeds: [0]")
    assert load_yaml(tmp_path / "one.yaml", ["root=z", "seeds=[1,2]"]) == {
        "root": "z",
        "path": "z/y",
        "seeds": [1, 2],
    }


def test_an_override_may_bring_a_base(tmp_path: Path) -> None:
    write(tmp_path, low="a: 1", high="x: {b: 2}")
    assert load_yaml(tmp_path / "high.yaml", [f"x.base={tmp_path}/low.yaml"]) == {"x": {"a": 1, "b": 2}}


def test_defaults_stand_where_the_config_is_silent(tmp_path: Path) -> None:
    defaults = {"out": "runs/${name}", "name": "nobody"}
    assert resolve({"name": "me"}, tmp_path, (), defaults) == {"out": "runs/me", "name": "me"}
    assert resolve({"out": "here"}, tmp_path, ["name=other"], defaults) == {"out": "here", "name": "other"}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("base: absent.yaml", [], "no config file absent.yaml"),
        ("base: one.yaml", [], "each other's base: one.yaml -> one.yaml"),
        ("- 1\n- 2", [], "holds a list"),
        ("a: [1", [], "is not a YAML config"),
        ("a: ${b}", [], "a reference cannot be resolved"),
        ("a: ???\nb: ${a}/x", [], "a must be given"),
        ("a: 1", ["a"], "override 'a'"),
        ("a: 1", ["=3"], "override '=3'"),
        ("a: [1, 2]", ["a.b.c=3"], "does not fit the config"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    write(tmp_path, one=text)
    with pytest.raises(UserError) as error:
        load_yaml(tmp_path / "one.yaml", overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["[", "'", "{", "\tx", "[1,", "*a", "*.tar", "[" * 3000])
def test_an_override_that_is_not_yaml_is_named(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match="override 'lr=|override \"lr="):
        resolve({"lr": 1}, tmp_path, [f"lr={value}"])


def test_text_that_utf8_cannot_write_is_named(tmp_path: Path) -> None:
    write(tmp_path, a='name: "before \\ud800"')
    with pytest.raises(UserError, match="a lone surrogate at the end of .*before"):
        load_yaml(tmp_path / "a.yaml")


def nested_aliases(levels: int) -> str:
    """Nine aliases of nine aliases of ...: 9 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines)


def test_aliases_that_stand_for_too_much_are_refused_before_they_are_expanded(tmp_path: Path) -> None:
    """Expanded, the first would take all memory; a value that contains itself has no end."""
    write(tmp_path, bomb=nested_aliases(30), self="a: &a [*a]", merged="a: &a {b: &b {<<: *a}}")
    for name in ("bomb", "self", "merged"):
        with pytest.raises(UserError, match=r"its aliases \(\*NAME\) stand for more than 100,000 values"):
            load_yaml(tmp_path / f"{name}.yaml")
    bomb = "{" + nested_aliases(30).replace("\n", ", ") + "}"
    with pytest.raises(UserError, match="stand for more than"):
        resolve({}, tmp_path, [f"x={bomb}"])


def test_aliases_are_read(tmp_path: Path) -> None:
    write(tmp_path, a=nested_aliases(3) + "\nmany: &m {lr: 1}\nown: {<<: *m, wd: 2}")
    read = load_yaml(tmp_path / "a.yaml")
    assert read["a2"][8][8] == ["x"] * 9
    assert read["own"] == {"lr": 1, "wd": 2}


def test_variables_of_the_environment_are_read_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_DATA", "/there")
    assert expand_variables("$SOME_DATA/${SOME_DATA}/x") == "/there//there/x"
    assert expand_variables("plain/path") == "plain/path"
    with pytest.raises(UserError, match="not set: NO_SUCH_DATA"):
        expand_variables("$SOME_DATA/$NO_SUCH_DATA")


def test_a_task_is_found_by_its_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_file("eval_only") == task_file("imagenet/eval_only") == "tasks/imagenet/eval_only.yaml"
    assert task_file("my/own.yaml") == "my/own.yaml"
    assert task_file("no_such") == "tasks/no_such.yaml"
    write(tmp_path / "tasks", eval_only="protocol: mine")
    monkeypatch.chdir(tmp_path)
    assert task_file("eval_only") == "tasks/eval_only.yaml", "one's own goes before what is packaged"
    for family in ("a", "b"):
        write(tmp_path / "tasks" / family, probe="protocol: mine")
    monkeypatch.setattr("mae_bench.config.CONFIGS", tmp_path)
    with pytest.raises(UserError, match="say a/probe or b/probe"):
        task_file("probe")


def test_the_nearest_files_are_named() -> None:
    with pytest.raises(UserError, match=r"did you mean suites/demo\.yaml"):
        resolve_path("suites/dmo.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"inner": {"depth": 2}, "mod": "a"}, "unknown key 'mod'; the nearest known key is 'mode'"),
        (
            {"inner": {"depth": 2, "widht": 2}},
            "unknown key 'inner.widht'; the nearest known key is 'inner.width'",
        ),
        (
            {"inner": {"depth": 2}, "other": {"depht": 2}},
            "unknown key 'other.depht'; the nearest known key is 'other.depth'",
        ),
        ({"inner": {"depth": "deep"}}, "inner.depth: Input should be a valid integer"),
        ({"inner": {}}, "inner.depth: Field required"),
        ({"inner": {"depth": 2}, "mode": "c"}, "(given 'c')"),
        ({"inner": {"depth": "???"}}, "inner.depth must be given"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(value: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(Outer, value, "here.yaml")
    assert str(error.value).startswith("here.yaml: ")
    assert message in str(error.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        build(Outer, {"inner": {"depth": 1}, "moed": 1, "lrr": 2}, "x")
    assert "'moed'" in str(error.value)
    assert "'lrr'" in str(error.value)


def test_what_fits_is_frozen() -> None:
    config = build(Outer, {"inner": {"depth": 2}}, "x")
    assert config.inner.width == 3
    with pytest.raises(ValueError, match="frozen"):
        config.lr = 1.0  # type: ignore[misc]


GRID = """
grid: vit_{size}_{epochs}ep{norm}
axes:
  size: {base: {model: {width: 768}}, huge: {model: {width: 1280, name: "vit-{size}"}}}
  epochs: [400, 800]
  norm:
    "": {protocol: "mae-{epochs}ep"}
    _norm: {protocol: "mae-{epochs}ep-norm", norm: true}
epochs: "{epochs}"
files: "images-{000..003}.tar"
model: {depth: 12}
"""


def test_a_grid_stands_for_every_combination_of_its_axes(tmp_path: Path) -> None:
    write(tmp_path, recipes=GRID)
    variants = find_variants(tmp_path / "recipes.yaml")
    assert len(variants) == 2 * 2 * 2
    assert load_yaml(tmp_path / "vit_huge_800ep_norm.yaml") == {
        "epochs": 800,  # of the axis's type
        "files": "images-{000..003}.tar",  # braces that name no axis stay
        "model": {"depth": 12, "width": 1280, "name": "vit-huge"},
        "protocol": "mae-800ep-norm",
        "norm": True,
    }
    assert load_yaml(tmp_path / "vit_base_400ep.yaml", ["model.depth=3"])["model"] == {
        "depth": 3,
        "width": 768,
    }


def test_a_file_stands_before_a_variant_of_its_name_and_a_changed_grid_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, recipes=GRID, vit_base_400ep="mine: true")
    assert load_yaml(tmp_path / "vit_base_400ep.yaml") == {"mine": True}
    assert load_yaml(tmp_path / "vit_base_800ep.yaml")["model"]["depth"] == 12
    write(tmp_path, recipes=GRID.replace("depth: 12", "depth: 24"))
    os.utime(tmp_path / "recipes.yaml", ns=(0, 0))
    assert load_yaml(tmp_path / "vit_base_800ep.yaml")["model"]["depth"] == 24


def test_a_grid_itself_is_no_config(tmp_path: Path) -> None:
    write(tmp_path, recipes=GRID, bad="grid: 3")
    with pytest.raises(UserError, match=r"a grid of 8 configs(?s:.)*for example .*vit_base_400ep\.yaml"):
        load_yaml(tmp_path / "recipes.yaml")
    with pytest.raises(UserError, match="grid: 3 with axes: None"):
        load_yaml(tmp_path / "bad.yaml")
