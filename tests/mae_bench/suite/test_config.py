"""What a suite expands to, what its cells' keys depend on, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from mae_bench.config import CONFIGS, load_yaml, not_identity
from mae_bench.errors import UserError
from mae_bench.record import NOT_IDENTITY
from mae_bench.registry import KINDS, kind, load_object
from mae_bench.suite.config import baseline_of, complete_job, expand, load_suite, places


def keys(suite: dict[str, Any], *overrides: str, digest: str = "d") -> dict[tuple[str, str, int], str]:
    loaded = load_suite(suite, overrides)
    cells = expand(loaded, dict.fromkeys(places(loaded), digest))
    return {(cell.backbone, cell.row, cell.seed): cell.key for cell in cells}


STORED_KEYS: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "cell_keys.json").read_text())


@pytest.mark.parametrize("name", STORED_KEYS)
def test_keys_of_packaged_suites_never_change(name: str, tmp_path: Path) -> None:
    """A changed key would run finished cells again. Digests of data are names of layouts here."""
    suite = load_suite(f"suites/{name}.yaml", ["data.root=/data"], tmp_path)
    cells = expand(suite, {place: place[0] for place in places(suite)})
    found = {f"{cell.backbone}/{cell.row}-s{cell.seed}": cell.key[:16] for cell in cells}
    assert found == STORED_KEYS[name]


def test_fields_outside_the_identity_are_listed_for_readers_of_records() -> None:
    marked = [not_identity(load_object(chosen.config)) for chosen in KINDS.values()]
    assert set().union(*marked) == NOT_IDENTITY
    for chosen in KINDS.values():
        fields = load_object(chosen.config).model_fields
        assert not_identity(load_object(chosen.config)) == NOT_IDENTITY & fields.keys(), chosen.config


def changed(before: dict[Any, str], after: dict[Any, str]) -> set[Any]:
    return {cell for cell in before if before[cell] != after[cell]}


def test_cells_are_backbones_then_transfers_by_seed(suite: dict[str, Any]) -> None:
    cells = expand(load_suite(suite, ["seeds=[0,1]"]), {})
    assert [(cell.backbone, cell.row, cell.seed) for cell in cells] == [
        ("good", "backbone", 0),
        ("base", "backbone", 0),
        ("good", "probe", 0),
        ("base", "probe", 0),
        ("good", "probe", 1),
        ("base", "probe", 1),
    ]
    assert cells[2].upstream == cells[0].dir
    assert cells[0].upstream is None
    assert cells[4].dir == Path(suite["out"]) / "cells" / "good" / f"probe-s1-{cells[4].key[:8]}"
    assert len({cell.key for cell in cells if cell.row == "probe" and cell.backbone == "good"}) == 2
    assert cells[2].task == "imagenet"
    assert cells[0].task == "pretrain"


def test_a_key_changes_with_what_decides_the_result(
    suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite["backbones"]["base"]["score"] = 2.0
    before = keys(suite)
    probes = {("good", "probe", 0), ("base", "probe", 0)}
    assert changed(before, keys(suite, "tasks.probe.score=7")) == probes
    assert changed(before, keys(suite, "backbones.good.score=7")) == {
        ("good", "backbone", 0),
        ("good", "probe", 0),
    }
    assert changed(before, keys(suite, digest="other")) == probes
    reseeded = keys(suite, "backbone_seed=1")
    assert not {reseeded[probe] for probe in probes} & set(before.values())
    monkeypatch.setitem(
        KINDS,
        "fake_transfer",
        kind("fake_transfer").__class__(**vars(kind("fake_transfer")) | {"version": 2}),
    )
    assert changed(before, keys(suite)) == probes


def test_a_key_does_not_change_with_where_things_are(suite: dict[str, Any], toy_data: Path) -> None:
    assert keys(suite) == keys(
        suite | {"out": "elsewhere", "data": {"imagenet": str(toy_data)}, "jobs": 1, "name": "other"}
    )


@pytest.mark.parametrize("form", ["{}", "file:{}"])
def test_a_checkpoint_counts_by_its_bytes(tmp_path: Path, form: str) -> None:
    weights = tmp_path / "weights.pth"
    suite = {"name": "x", "backbones": {"a": {"kind": "checkpoint", "source": form.format(weights)}}}
    weights.write_bytes(b"one")
    before = keys(suite)
    assert keys(suite) == before
    weights.write_bytes(b"two")
    assert changed(before, keys(suite))


def test_a_run_counts_by_its_export(tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    (export / "backbone.json").write_text("one")
    suite = {"name": "x", "backbones": {"a": {"kind": "checkpoint", "source": f"run:{tmp_path}"}}}
    before = keys(suite)
    (tmp_path / "log.txt").write_text("a log is no weight")
    assert keys(suite) == before
    (export / "backbone.json").write_text("two")
    assert changed(before, keys(suite))


def test_a_key_does_not_change_with_how_the_work_is_done(tmp_path: Path) -> None:
    value = {"name": "x", "data": {"root": str(tmp_path)}, "backbones": {"a": {"base": "pretrain/demo.yaml"}}}
    value["tasks"] = {"t": {"base": "tasks/coco/maskrcnn_demo.yaml"}}
    names = ("num_workers", "max_bad_images", "checkpoint_seconds", "num_reconstructions")
    how = [f"backbones.a.{name}=1" for name in names] + [
        "tasks.t.num_workers=1",
        "tasks.t.checkpoint_period=7",
    ]
    assert keys(value, *how) == keys(value)
    assert keys(value, "backbones.a.mask_ratio=0.5") != keys(value)


def test_defaults(suite: dict[str, Any]) -> None:
    del suite["out"]
    loaded = load_suite(suite)
    assert loaded.out == "runs/toy"
    assert loaded.row_of_baseline == "good"
    assert loaded.tasks["probe"]["data"] == suite["data"]["root"] + "/imagenet"
    assert loaded.tasks["probe"]["score"] == 1.0
    assert load_suite(suite, out="there").out == "there"
    assert load_suite(suite | {"out": "mine"}).out == "mine"
    assert load_suite(suite | {"out": "mine"}, out="there").out == "there"


def test_a_job_may_have_data_of_its_own(suite: dict[str, Any]) -> None:
    suite["tasks"]["probe"]["data"] = "mine"
    assert load_suite(suite).tasks["probe"]["data"] == "mine"
    assert load_suite(suite, ["data.imagenet=whose"]).tasks["probe"]["data"] == "mine"
    suite["tasks"]["probe"]["data"] = "???"
    assert load_suite(suite, ["data.imagenet=whose"]).tasks["probe"]["data"] == "whose"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("taks.probe.score=1", "unknown key 'taks'; the nearest known key is 'tasks'"),
        ("tasks.probe.scores=1", "tasks.probe: unknown key 'scores'; the nearest known key is 'score'"),
        ("tasks.prob.score=1", "tasks.prob has no kind"),
        ("tasks.probe.score=high", "tasks.probe: score: Input should be a valid number"),
        ("data.imagnet=x", "unknown key 'data.imagnet'; the nearest known key is 'data.imagenet'"),
        ("baseline=goood", "baseline 'goood' is not one of the backbones"),
        ("tasks.probe.kind=finetuning", "unknown job kind 'finetuning'"),
        ("tasks.probe.kind=fake_maker", "tasks.probe is of kind 'fake_maker', which makes a backbone"),
        ("jobs=0", "jobs"),
        ("seeds=[0,1,0]", "seeds: Value error, each seed once"),
        ("data=foo", "Next: data.root=foo"),
        ("tasks.probe.kind=[1]", "unknown job kind [1]"),
        ("tasks.probe.score=.inf", "tasks.probe: score: Input should be a finite number"),
        ("seeds=[]", "seeds"),
        ("data.root=null", "data.imagenet must be given"),
        ("nonsense", "override 'nonsense'"),
    ],
)
def test_what_is_wrong_is_named(suite: dict[str, Any], override: str, message: str) -> None:
    del suite["tasks"]["probe"]["protocol"]
    with pytest.raises(UserError) as error:
        load_suite(suite, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name", ["../../esc", "..", ".", "", "a/b", "a\\b", ".hidden", " a", "a\n", "é" * 101]
)
@pytest.mark.parametrize("place", ["name", "backbones", "tasks"])
def test_names_are_valid_for_folders(suite: dict[str, Any], place: str, name: str) -> None:
    job = next(iter(suite[place].values())) if place != "name" else None
    suite[place] = name if job is None else {name: job}
    with pytest.raises(UserError, match=f"{place}: .*not a name that is valid for a folder"):
        load_suite(suite)


def test_names_may_have_spaces_dots_and_letters_of_any_script(suite: dict[str, Any]) -> None:
    suite["backbones"] = {
        "ViT-B/16".replace("/", " "): {"kind": "fake_maker"},
        "mae_1.5 (à 画)": {"kind": "fake_maker"},
    }
    assert len(expand(load_suite(suite), {})) == 4


def test_data_that_must_be_given_is_named_with_the_override(suite: dict[str, Any]) -> None:
    suite["data"] = {"root": "???", "imagenet": "${data.root}/imagenet"}
    with pytest.raises(UserError, match="data.root must be given") as error:
        load_suite(suite)
    assert "data.root=VALUE" in error.value.fix


FOLDERS = ("data.pretrain=a", "data.imagenet=b", "data.coco=c", "data.ade20k=d")


def test_naming_every_folder_is_enough() -> None:
    suite = load_suite("suites/small.yaml", FOLDERS)
    assert [suite.backbones[name]["data"] for name in ("mae", "supervised")] == ["a", "a"]
    assert [job["data"] for job in suite.tasks.values()] == ["b", "b", "c", "d"]


@pytest.mark.parametrize("left_out", range(4))
def test_a_folder_that_is_not_named_is_asked_for(left_out: int) -> None:
    folders = [folder for i, folder in enumerate(FOLDERS) if i != left_out]
    key = FOLDERS[left_out].partition("=")[0]
    with pytest.raises(UserError, match=f"{key} must be given"):
        load_suite("suites/small.yaml", folders)


def test_null_leaves_a_task_or_a_backbone_out() -> None:
    folders = [folder for folder in FOLDERS if "coco" not in folder]
    suite = load_suite("suites/small.yaml", [*folders, "tasks.maskrcnn=null", "backbones.mae=null"])
    assert list(suite.tasks) == ["finetune", "linear", "upernet"]
    assert list(suite.backbones) == ["supervised", "random"]


def test_a_job_is_no_suite() -> None:
    with pytest.raises(UserError, match="config of one job") as error:
        load_suite("pretrain/own_images.yaml")
    assert "mae-bench pretrain pretrain/own_images.yaml" in error.value.fix


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_heads=0", "model.num_heads: Input should be greater than 0"),
        ("model.depth=0", "model.depth: Input should be greater than 0"),
        ("model.num_heads=5", "embed_dim 128 is not divisible by num_heads 5"),
        ("model.embed_dim=126", "model.embed_dim: Input should be a multiple of 4"),
        ("model.img_size=[65,64]", "img_size (65, 64) is not divisible by patch_size (8, 8)"),
        ("model.patch_size=[0,8]", "model.patch_size.0: Input should be greater than 0"),
        ("model.mean=[0.5]", "mean has 1"),
        ("decoder_num_heads=7", "not divisible by decoder_num_heads 7"),
    ],
)
def test_a_model_that_cannot_be_built_is_named_in_the_plan(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        complete_job("mine", load_yaml("pretrain/demo.yaml", ["data=x", override]))
    assert message in str(error.value)


def test_the_baseline_is_that_of_the_suite_last_run(tmp_path: Path) -> None:
    assert baseline_of(tmp_path) == ""
    (tmp_path / "suite.json").write_text('{"baseline": null, "backbones": {"mae": {}}}')
    assert baseline_of(tmp_path) == "mae"
    (tmp_path / "suite.json").write_text('{"baseline"; null, "backbones": {"mae": {}}}')
    with pytest.raises(UserError, match=r"suite\.json cannot be read") as error:
        baseline_of(tmp_path)
    assert error.value.fix == "give --baseline NAME"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("suites/*.yaml")), ids=lambda path: path.stem)
def test_every_packaged_suite_is_whole(path: Path) -> None:
    """Every job of it validates; two backbones or more, and no two cells in one folder."""
    cells = expand(load_suite(path, ["data.root=somewhere"]), {})
    assert len({cell.dir for cell in cells}) == len(cells)


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("fake")])
def test_every_kind_has_a_config_and_a_place_for_its_results(name: str) -> None:
    assert "kind" in load_object(kind(name).config).model_fields
    assert kind(name).task
