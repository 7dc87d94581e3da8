"""What does not fit a backbone is found by the plan, and before any cell runs."""

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from backbones.describe import describe
from backbones.load import load_backbone
from mae_bench.config import build
from mae_bench.errors import UserError
from mae_bench.models.vit import build_vit
from mae_bench.record import read_record
from mae_bench.registry import EXTRAS, Extra, kind, load_object
from mae_bench.runner.fitting import fit_to_backbone, read_exported_spec
from mae_bench.runner.live import View
from mae_bench.runner.plan import plan_of, render
from mae_bench.runner.runner import run_suite
from mae_bench.spec import BackboneSpec
from mae_bench.suite.config import load_suite
from tasks.imagenet.fit import find_nearest_size
from tests.tasks.imagenet.toy import MODEL, SPEC, write_backbone, write_images

KNN = {"kind": "knn", "protocol": "toy", "ks": [1], "k": 1, "crop_pct": 1.0, "nearest_to": [64, 64]}
FOUR: dict[str, Any] = {"in_chans": 4, "mean": (0.5,) * 4, "std": (0.25,) * 4}
FOURTEEN = replace(SPEC, img_size=(28, 28), patch_size=(14, 14))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data" / "imagenet", 6, 3)


def suite_of(tmp_path: Path, source: str, **task: Any) -> dict[str, Any]:
    return {
        "name": "fitting",
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "data": {"root": str(tmp_path / "data")},
        "backbones": {"toy": {"kind": "checkpoint", "source": source}},
        "tasks": {"knn": KNN | task},
    }


def finetuned(tmp_path: Path) -> dict[str, Any]:
    """Return a suite whose last task fine-tunes, with RandAugment by default."""
    suite = suite_of(tmp_path, write_backbone(tmp_path / "export"))
    task = {"kind": "finetune", "protocol": "toy", "epochs": 1, "base_lr": 1e-3, "global_batch_size": 6}
    suite["tasks"]["finetune"] = task | {"nearest_to": [64, 64]}
    return suite


def planned(suite: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """Return the cell of the last task in the plan."""
    cell: dict[str, Any] = plan_of(load_suite(suite, overrides))["cells"][-1]
    return cell


def run(suite: dict[str, Any], *overrides: str) -> str:
    """Run a suite; return what its view prints."""
    shown = StringIO()
    run_suite(load_suite(suite, overrides), View(Console(file=shown, width=500)), "")
    return shown.getvalue()


def test_a_patch_that_does_not_divide_the_size_is_refused_before_any_cell_runs(
    data: Path, tmp_path: Path
) -> None:
    suite = suite_of(tmp_path, write_backbone(tmp_path / "export", FOURTEEN), img_size=[64, 64])
    cell = planned(suite)
    assert cell["state"] == "would fail"
    assert "img_size (64, 64) with patch_size (14, 14)" in cell["reason"]
    assert "tasks.knn.img_size=nearest-64x64, which is (70, 70) for this backbone" in cell["fix"]
    with pytest.raises(UserError, match=r"toy · knn: img_size \(64, 64\) with patch_size \(14, 14\)"):
        run(suite)
    assert not list((tmp_path / "run").glob("cells/**/record.json"))
    assert planned(suite, "tasks.knn.img_size=nearest")["state"] == "left"


def test_the_nearest_size_is_used_noted_and_part_of_the_record(data: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, write_backbone(tmp_path / "export", FOURTEEN))
    run(suite, "tasks.knn.img_size=nearest")
    (path,) = (tmp_path / "run").glob("cells/toy/knn-*/record.json")
    record = read_record(path)
    assert record.config["img_size"] == [70, 70]
    assert record.backbone_spec["img_size"] == [70, 70]
    assert "img_size=nearest-64x64 is [70, 70] for this backbone" in record.notes
    assert planned(suite, "tasks.knn.img_size=nearest")["state"] == "done"
    digests = set()
    for size in ("nearest", "nearest-64x64", "nearest-60x64", "[28,28]"):
        digests.add(planned(suite, f"tasks.knn.img_size={size}")["key"])
    assert len(digests) == 3, "the size that nearest stands for is part of the key"


@pytest.mark.parametrize(
    ("size", "patch", "nearest"),
    [
        ((64, 64), (14, 14), (70, 70)),
        ((224, 224), (14, 14), (224, 224)),
        ((21, 20), (14, 14), (28, 14)),
        ((5, 33), (16, 16), (16, 32)),
        ((24, 64), (16, 8), (32, 64)),
    ],
)
def test_each_side_goes_to_the_nearest_multiple_and_ties_go_up(
    size: tuple[int, int], patch: tuple[int, int], nearest: tuple[int, int]
) -> None:
    assert find_nearest_size(size, patch) == nearest


@pytest.mark.parametrize("size", ["near", "nearest-64", "nearest-0x64", [64]])
def test_another_word_is_refused(size: Any) -> None:
    with pytest.raises(UserError, match="img_size"):
        build(load_object(kind("knn").config), KNN | {"data": "", "img_size": size}, "test")


def test_rgb_images_with_a_backbone_of_four_channels_are_refused(data: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, write_backbone(tmp_path / "export", replace(SPEC, **FOUR)))
    cell = planned(suite)
    assert cell["state"] == "would fail"
    assert "toy · knn" in cell["reason"]
    assert "the model takes 4" in cell["reason"]
    assert "backbones.toy=null" in cell["fix"]
    with pytest.raises(UserError, match="the model takes 4"):
        run(suite)
    assert not list((tmp_path / "run").glob("cells/**/record.json"))


def test_arrays_of_four_channels_with_an_rgb_backbone_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "imagenet", 6, 3, num_channels=4)
    suite = suite_of(tmp_path, write_backbone(tmp_path / "export"))
    assert "the model takes 3 channels" in planned(suite)["reason"]
    of_four = suite_of(tmp_path, write_backbone(tmp_path / "export4", replace(SPEC, **FOUR)))
    assert planned(of_four)["state"] == "left"


def test_a_model_that_is_trained_in_the_suite_is_checked_too(data: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "")
    suite["backbones"] = {"toy": {"kind": "random", "model": MODEL | FOUR}}
    assert "the model takes 4" in planned(suite)["reason"]
    suite["backbones"] = {
        "toy": {
            "kind": "supervised",
            "protocol": "toy",
            "model": MODEL | FOUR,
            "epochs": 1,
            "base_lr": 1.0,
            "global_batch_size": 2,
            "auto_augment": None,
        }
    }
    pretrain = {"kind": "pretrain", "protocol": "toy", "model": MODEL | FOUR, "epochs": 1, "base_lr": 1.0}
    sizes = {"decoder_num_heads": 2, "decoder_embed_dim": 8, "decoder_depth": 1, "global_batch_size": 2}
    suite["backbones"]["mae"] = pretrain | sizes
    assert "the model takes 4" in plan_of(load_suite(suite))["cells"][1]["reason"]
    del suite["backbones"]["mae"]
    maker, transfer = plan_of(load_suite(suite))["cells"]
    assert (maker["state"], transfer["state"]) == ("would fail", "would fail")
    suite["backbones"]["toy"]["auto_augment"] = "rand-m9-mstd0.5-inc1"
    assert "auto_augment=rand" in plan_of(load_suite(suite))["cells"][0]["reason"]


@pytest.mark.parametrize("name", ["maskrcnn", "upernet"])
def test_dense_tasks_take_rgb_backbones_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = kind(name).extra
    monkeypatch.setitem(EXTRAS, extra, Extra((), "dense tasks", ""))
    layout = kind(name).layout
    monkeypatch.setattr("mae_bench.runner.plan.check_data", lambda suite: ({}, {}))
    suite = suite_of(tmp_path, write_backbone(tmp_path / "export", replace(SPEC, **FOUR)))
    suite["tasks"] = {name: {"kind": name, "protocol": "toy", "iterations": 10000}}
    cell = planned(suite)
    assert cell["state"] == "would fail"
    assert "a backbone of 4 channels" in cell["reason"]
    assert f"tasks.{name}=null" in cell["fix"]
    with pytest.raises(UserError, match="4 channels") as error:
        fit_to_backbone(kind(name), None, replace(SPEC, **FOUR))
    assert layout in error.value.expected


def test_a_pyramid_that_the_patch_cannot_make_is_refused_by_the_plan(tmp_path: Path) -> None:
    config = {"kind": "maskrcnn", "protocol": "toy", "iterations": 10000, "data": ""}
    chosen = kind("maskrcnn")
    with pytest.raises(UserError, match=r"pyramid strides \[4, 8, 16, 32\] over a map of stride 14"):
        fit_to_backbone(chosen, build(load_object(chosen.config), config, "test"), FOURTEEN)


@pytest.mark.parametrize(
    ("spec", "reason", "fix"),
    [
        (
            replace(SPEC, img_size=(16, 16), patch_size=(8, 4)),
            "patches of 8 x 4 pixels",
            "backbones.toy=null",
        ),
        (FOURTEEN, "crop_size 512 with a patch of 14", "tasks.upernet.crop_size=518"),
    ],
)
def test_patches_that_upernet_cannot_take_are_refused_by_the_plan(
    spec: BackboneSpec, reason: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXTRAS, "ade20k", Extra((), "dense tasks", ""))
    monkeypatch.setattr("mae_bench.runner.plan.check_data", lambda suite: ({}, {}))
    suite = suite_of(tmp_path, write_backbone(tmp_path / "export", spec))
    suite["tasks"] = {"upernet": {"kind": "upernet", "protocol": "toy", "iterations": 10000}}
    cell = planned(suite)
    assert cell["state"] == "would fail"
    assert reason in cell["reason"]
    assert fix in cell["fix"]


def test_randaugment_on_arrays_of_three_channels_is_refused_by_the_plan(tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "imagenet", 6, 3, num_channels=3)
    suite = finetuned(tmp_path)
    cell = planned(suite)
    assert cell["state"] == "would fail"
    assert "toy · finetune: auto_augment=rand" in cell["reason"]
    assert "tasks.finetune.auto_augment=null" in cell["fix"]
    with pytest.raises(UserError, match="auto_augment=rand"):
        run(suite)
    assert not list((tmp_path / "run").glob("cells/**/record.json"))
    assert planned(suite, "tasks.finetune.auto_augment=null")["state"] == "left"


def test_randaugment_on_files_is_planned(data: Path, tmp_path: Path) -> None:
    suite = finetuned(tmp_path)
    assert planned(suite)["state"] == "left"


class TestDescription:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        """A bare state_dict of timm's names, of which nothing states the number of heads."""
        torch.manual_seed(0)
        torch.save(build_vit(SPEC, global_pool="token").state_dict(), tmp_path / "bare.pth")
        return tmp_path / "bare.pth"

    def config(self, source: Path | str, **changes: Any) -> Any:
        values = {"kind": "checkpoint", "source": str(source), "spec": {"num_heads": 2}} | changes
        return build(load_object(kind("checkpoint").config), values, "test")

    def spec(self, file: Path, **fields: Any) -> BackboneSpec:
        found, _ = describe(self.config(file, spec=fields))
        assert found is not None
        return found

    def test_it_is_what_load_backbone_finds(self, file: Path) -> None:
        _, spec, report = load_backbone(file, overrides={"num_heads": 2})
        for _ in range(2):  # read, then cached
            assert describe(self.config(file)) == (spec, report.assumptions)
        assert self.spec(file, num_heads=4).num_heads == 4

    def test_other_weights_in_the_file_are_read_again(self, file: Path) -> None:
        assert self.spec(file, num_heads=2).depth == 2
        deeper = build_vit(replace(SPEC, depth=3), global_pool="token")
        torch.save(deeper.state_dict(), file)
        assert self.spec(file, num_heads=2).depth == 3

    def test_nothing_imports_torch_for_an_export_or_what_was_read_before(
        self, file: Path, tmp_path: Path
    ) -> None:
        export = write_backbone(tmp_path / "export")
        describe(self.config(file))
        code = (
            "import sys, json; from backbones.config import CheckpointConfig\n"
            "from backbones.describe import describe\n"
            "for config in json.loads(sys.argv[1]):\n"
            "    assert describe(CheckpointConfig(**config))[0].embed_dim == 16\n"
            "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
        )
        configs = [self.config(file), self.config(Path(export), spec={})]
        given = json.dumps([config.model_dump() for config in configs])
        done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_weights_on_a_hub_are_not_read(self) -> None:
        assert describe(self.config("timm:vit_tiny_patch16_224")) == (None, [])

    def test_what_is_assumed_about_them_is_printed_once_they_are_read(
        self, file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, assumptions = describe(self.config(file))
        monkeypatch.setattr("backbones.describe.source_path", lambda source: None)
        suite = suite_of(tmp_path, str(file))
        suite["backbones"]["toy"]["spec"] = {"num_heads": 2}
        shown = run(suite)
        lines = [f"toy: {assumption}" for assumption in assumptions]
        assert all(shown.count(line) == 1 for line in lines)
        assert shown.index(lines[0]) < shown.index("start  toy · knn")

    def test_a_plan_names_a_checkpoint_that_cannot_be_read(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.pth").write_bytes(b"no weights")
        cells = plan_of(load_suite(suite_of(tmp_path, str(tmp_path / "bad.pth"))))["cells"]
        assert [cell["state"] for cell in cells] == ["would fail", "left"]

    def test_plan_and_failure_state_what_is_expected_and_what_to_set(
        self, file: Path, data: Path, tmp_path: Path
    ) -> None:
        suite = suite_of(tmp_path, str(file))
        cell = plan_of(load_suite(suite))["cells"][0]
        assert "num_heads cannot be inferred" in cell["reason"]
        assert cell["reason"].endswith("(expected: one of 1, 2, 4, 8, 16)")
        assert "backbones.toy.spec.num_heads=N to evaluate" in cell["fix"]
        assert cell["fix"] in run(suite)
        tried = plan_of(load_suite(suite))["cells"][0]
        assert tried["state"] == "failed"
        assert (tried["reason"], tried["fix"]) == (cell["reason"], cell["fix"])
        assert planned(suite, "backbones.toy.spec.num_heads=2")["state"] != "would fail"

    def test_a_plan_prints_what_is_assumed(self, file: Path, data: Path, tmp_path: Path) -> None:
        suite = suite_of(tmp_path, str(file))
        suite["backbones"]["toy"]["spec"] = {"num_heads": 2}
        _, assumptions = describe(self.config(file))
        plan = plan_of(load_suite(suite))
        assert [cell.get("assumptions") for cell in plan["cells"]] == [assumptions, None]
        shown = StringIO()
        Console(file=shown, width=500).print(render(plan))
        assert all(shown.getvalue().count(f"toy: {assumption}") == 1 for assumption in assumptions)

    def test_assumptions_are_printed_once_and_kept_by_every_score(
        self, file: Path, data: Path, tmp_path: Path
    ) -> None:
        suite = suite_of(tmp_path, str(file))
        suite["backbones"]["toy"]["spec"] = {"num_heads": 2}
        _, assumptions = describe(self.config(file))
        assert any("norm_eps 1e-06" in assumption for assumption in assumptions)
        assert not any("num_heads" in assumption for assumption in assumptions), "it is given"
        shown = run(suite)
        assert all(shown.count(f"toy: {assumption}") == 1 for assumption in assumptions)
        records = [read_record(path) for path in (tmp_path / "run").glob("cells/toy/*/record.json")]
        assert len(records) == 2
        for record in records:
            assert record.conversion_report["assumptions"] == assumptions
        suite["tasks"]["again"] = KNN | {"k": 2, "ks": [2]}
        assert run(suite).count(assumptions[0]) == 1, "a new task repeats them, from the record"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"spec": 3}', '{"spec": {}}', '{"spec": {"depth": 1}}'])
def test_a_damaged_description_of_an_export_is_named(tmp_path: Path, content: str) -> None:
    write_backbone(tmp_path / "export")
    assert read_exported_spec(tmp_path) == SPEC
    path = tmp_path / "export" / "backbone.json"
    path.write_text(content)
    with pytest.raises(UserError, match=str(path)):
        read_exported_spec(tmp_path)
