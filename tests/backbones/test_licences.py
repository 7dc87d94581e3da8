"""Licences travel from the publisher to the record; released heads are refused by name."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from backbones.config import CheckpointConfig
from backbones.inspection import inspect_checkpoint, render
from backbones.job import run
from backbones.load import load_backbone
from backbones.reading import official
from backbones.reading.licence import parse_card
from backbones.reading.official import load_table
from backbones.reading.source import open_source
from mae_bench.config import build
from mae_bench.errors import UserError
from mae_bench.job import Job
from mae_bench.progress import Progress
from tests.backbones.formats import toys_detectron2, toys_mmseg

pytestmark = pytest.mark.usefixtures("toy_heads")

GATED = [name for name, entry in load_table().items() if entry.gated and not entry.head]
HEADS = [name for name, entry in load_table().items() if entry.head]


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- vision\n---\n# Card", "apache-2.0"),
        ("\ufeff---\ntags: []\nlicense: 'mit'\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: dinov3-license\n---\n", "dinov3-license"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: []\n---\nlicense: mit", ""),
        ("# Card\nlicense: mit", ""),
        ("", ""),
        ("---\nlicense: mit", ""),
    ],
)
def test_cards(text: str, licence: str) -> None:
    assert parse_card(text) == licence


def test_the_licence_of_a_card_reaches_the_records(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    shutil.copy(files["timm.safetensors"][0], folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model")
    found = inspect_checkpoint(folder)
    assert found["licence"] == found["report"]["licence"] == "cc-by-nc-4.0"
    console = Console(width=200, record=True)
    console.print(render(found))
    assert "cc-by-nc-4.0" in console.export_text()

    value = {"kind": "checkpoint", "source": str(folder)}
    job = Job("x", "checkpoint", value, tmp_path / "cell", 0)
    outcome = run(build(CheckpointConfig, value, "test"), job, Progress())
    assert outcome.conversion_report["licence"] == "cc-by-nc-4.0"
    assert "licence" not in outcome.backbone_spec, "the spec of older records stays readable"
    assert load_backbone(f"run:{tmp_path / 'cell'}")[2].licence == "cc-by-nc-4.0", "as each transfer reads it"


def test_without_a_statement_it_is_unknown(files: dict[str, Any]) -> None:
    assert load_backbone(files["encoder"][0])[2].licence == ""


def test_official_weights_state_licence_and_score(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, Any]
) -> None:
    monkeypatch.setattr(official, "_fetch", lambda entry: files["encoder"][0])
    monkeypatch.setattr(official, "_check_content", lambda *_: None)
    checkpoint = open_source("official:mae_vit_base_finetuned")
    assert (checkpoint.licence, checkpoint.score) == ("CC-BY-NC-4.0", "ImageNet-1k top1 83.664")


@pytest.mark.parametrize("name", HEADS)
def test_a_released_head_is_refused_before_it_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(official, "_fetch", lambda _: pytest.fail("it was downloaded"))
    with pytest.raises(
        UserError, match=f"official:{name} is a .*(classifier|head).*, without a backbone"
    ) as error:
        open_source(f"official:{name}")
    backbone = error.value.fix.partition("official:")[2].partition(",")[0]
    assert not load_table()[backbone].head
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("name", GATED)
def test_a_gated_file_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(official, "_fetch", lambda _: pytest.fail("it was downloaded"))
    with pytest.raises(UserError, match=f"official:{name} is gated") as error:
        open_source(f"official:{name}")
    entry = load_table()[name]
    file = error.value.expected.partition(",")[0]
    assert file.startswith("dinov3_vit")
    assert entry.url.endswith(f"/{file}")
    assert entry.gated in error.value.fix
    assert f"--format {entry.format}" in error.value.fix


def test_released_detectors_are_read(tmp_path: Path) -> None:
    """ViTDet's files are pickles of numpy arrays, with three box heads in a cascade."""
    state = {f"backbone.net.{name}": t.numpy() for name, t in toys_detectron2.VITS["windows"].items()}
    for stage in range(3):
        state[f"roi_heads.box_predictor.{stage}.cls_score.weight"] = torch.zeros(81, 16).numpy()
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "x"}, protocol=4))
    _, spec, report = load_backbone(tmp_path / "model_final.pkl")
    assert (spec.arch, report.format) == ("sam", "detectron2")
    assert {reason for name, reason in report.dropped.items() if "roi_heads" in name} == {
        "heads of the detector: each task trains its own"
    }


def test_released_segmentors_are_read(tmp_path: Path) -> None:
    """UPerNet's file holds the MAE backbone next to its two heads."""
    path, options = toys_mmseg.write(tmp_path)["mae"]
    _, _, report = load_backbone(path, **options)
    assert report.format == load_table()["upernet_mae_base"].format == "mmseg"
    assert [name for name in report.dropped if name.startswith("decode_head.")]


def test_every_task_checkpoint_has_its_score() -> None:
    for name, entry in load_table().items():
        if name.startswith(("vitdet_", "upernet_")) or name.endswith("_finetuned"):
            assert entry.score or name.startswith("beit"), name


def test_the_notice_names_every_licence_of_the_table() -> None:
    notice = (Path(__file__).parents[2] / "NOTICE").read_text(encoding="utf-8")
    licences = {entry.licence for entry in load_table().values() if entry.licence}
    assert licences == {"CC-BY-NC-4.0", "Apache-2.0", "MIT"}
    assert all(licence in notice.replace("CC-BY-NC 4.0", "CC-BY-NC-4.0") for licence in licences)
