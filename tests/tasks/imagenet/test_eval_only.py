"""Evaluation without training: heads of any origin, ReaL, ImageNet-C and subsets of ImageNet's classes."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.classifier import extract_head
from backbones.config import CheckpointConfig
from backbones.job import run as bring
from backbones.reading.source import Checkpoint
from mae_bench.config import build
from mae_bench.errors import UserError
from mae_bench.job import Outcome
from mae_bench.models.vit import build_vit
from mae_bench.progress import Progress
from tasks.imagenet import eval_only, finetune, robustness
from tasks.imagenet.config import EvalOnlyConfig, FinetuneConfig, RobustnessConfig
from tasks.imagenet.data import load_imagenet_classes
from tasks.imagenet.evaluate import Predictions
from tests.parity import assert_within_rounding, in_float64
from tests.tasks.imagenet.toy import PLAIN, SPEC, TRAIN, job

COMMON: dict[str, Any] = {"protocol": "toy", "crop_pct": 1.0}


def row(folder: Path, source: Path, **options: Any) -> str:
    """Convert a checkpoint as a row of a suite does."""
    config = build(CheckpointConfig, {"kind": "checkpoint", "source": str(source), **options}, "test")
    bring(config, job(folder), Progress())
    return str(folder)


def as_it_is(data: Path, folder: Path, backbone: str, **changes: Any) -> Outcome:
    config = build(EvalOnlyConfig, {"kind": "eval_only", "data": str(data), **COMMON, **changes}, "test")
    return eval_only.run(config, job(folder, backbone), Progress())


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_fine_tuned_model_scores_the_same_when_it_comes_back(data, tmp_path, backbone, pool):
    values = {
        "kind": "finetune",
        "data": str(data),
        **TRAIN,
        **PLAIN,
        "base_lr": 0.3,
        "epochs": 6,
        "layer_decay": 0.9,
    }
    config = build(FinetuneConfig, values | {"global_pool": pool, "export_classifier": True}, "test")
    trained = finetune.run(config, job(tmp_path / "cell", backbone), Progress())
    outcome = as_it_is(data, tmp_path / "again", row(tmp_path / "row", tmp_path / "cell/classifier"))
    for name in ("top1", "top5", "loss"):
        assert outcome.metrics[name].value == pytest.approx(trained.metrics[name].value, rel=1e-5), name
    found = [np.load(tmp_path / place / "predictions.npz") for place in ("cell", "again")]
    assert np.array_equal(found[0]["top5"], found[1]["top5"])


def reference_file(folder: Path, pool: str) -> tuple[Path, torch.nn.Module]:
    """Return a fine-tuned classifier as facebookresearch/mae saves it, and its timm model."""
    torch.manual_seed(0)
    model: Any = build_vit(SPEC, num_classes=3, global_pool=pool)
    torch.nn.init.normal_(model.head.weight)
    torch.save({"model": model.state_dict()}, folder / "finetuned.pth")
    return folder / "finetuned.pth", model.eval()


def logits_of(model: torch.nn.Module, data: Path) -> dict[str, int]:
    """Return the class that a model predicts for each validation image, by a plain loop."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPEC.mean, SPEC.std))
    found = {}
    for path in sorted((data / "val").rglob("*.png")):
        pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) / 255
        found[path.name] = int(model(((pixels - mean) / std)[None]).argmax())
    return found


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_reference_format_classifier_is_evaluated_without_training(data, tmp_path, pool):
    path, model = reference_file(tmp_path, pool)
    options = {"spec": {"num_heads": 2}} | ({"format": "official_mae"} if pool == "token" else {})
    outcome = as_it_is(data, tmp_path / "cell", row(tmp_path / "row", path, **options))
    expected = logits_of(model, data)
    labels = {path.name: int(path.parent.name[-1]) for path in (data / "val").rglob("*.png")}
    right = sum(expected[name] == labels[name] for name in labels)
    assert outcome.metrics["top1"].value == pytest.approx(100 * right / 9)
    assert outcome.num_samples == 9


def test_a_probes_batch_norm_is_folded_into_its_head():
    torch.manual_seed(0)
    norm, layer = torch.nn.BatchNorm1d(4, affine=False, eps=1e-6), torch.nn.Linear(4, 3)
    for _ in range(5):
        norm(torch.randn(8, 4) * 3 + 1)
    probe = torch.nn.Sequential(norm, layer).eval()
    tensors = {f"head.{name}": tensor for name, tensor in probe.state_dict().items()}
    head = extract_head(Checkpoint("x", "0" * 64, tensors))
    assert head is not None
    x = torch.randn(6, 4)
    assert_within_rounding(
        head(x), in_float64(probe)(x.double()), roundings=32
    )  # folded weights, four products


def test_what_is_no_classifier_of_these_classes_is_refused(data, tmp_path, backbone):
    with pytest.raises(UserError, match="has no classifier"):
        as_it_is(data, tmp_path / "a", row(tmp_path / "row", Path(backbone)))
    path, _ = reference_file(tmp_path, "avg")
    other = tmp_path / "other/val/only"
    other.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(other / "1.png")
    with pytest.raises(UserError, match="3 classes on 1 class folders(.|\n)*Next: give their folder as data"):
        as_it_is(tmp_path / "other", tmp_path / "b", row(tmp_path / "row2", path, spec={"num_heads": 2}))
    with pytest.raises(UserError, match="two heads"):
        extract_head(Checkpoint("x", "0" * 64, {"head_dist.weight": torch.zeros(3, 4)}))


def predictions(top1: list[int]) -> Predictions:
    return Predictions(
        np.arange(len(top1)), np.zeros(len(top1), int), np.array(top1)[:, None], np.zeros(len(top1))
    )


class TestReal:
    NAMES = [f"n01440764/ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1, 2, 4)]

    def test_any_accepted_label_counts_and_images_without_one_do_not(self):
        labels = [[5], [], [1, 2], [9]]  # of images 1 to 4
        assert eval_only.compute_real_accuracy(
            predictions([2, 5, 7, 8]), self.NAMES, labels
        ) == pytest.approx(100 * 2 / 3)

    @pytest.mark.parametrize("content", ["{", "{}", "[1, 2]"])
    def test_another_file_is_refused(self, tmp_path, content):
        (tmp_path / "real.json").write_text(content)
        with pytest.raises(UserError):
            eval_only.read_real_labels(tmp_path / "real.json")

    def test_other_classes_are_refused(self, data, tmp_path):
        with pytest.raises(
            UserError, match="real=x.json and .* has 3 classes: 1000 of ImageNet-1k are missing"
        ):
            as_it_is(data, tmp_path, "", real="x.json")

    def test_images_that_are_not_imagenets_are_refused(self):
        with pytest.raises(UserError, match="has no number"):
            eval_only.compute_real_accuracy(predictions([1]), ["class0/1.png"], [[1]])
        with pytest.raises(UserError, match="3 with 1 entries"):
            eval_only.compute_real_accuracy(predictions([1]), self.NAMES[:1], [[1]])
        with pytest.raises(UserError, match="none of the images"):
            eval_only.compute_real_accuracy(predictions([1]), self.NAMES[:1], [[1], [2], []])


class TestCorruptions:
    def all_at(self, value: float) -> dict[str, float]:
        names = product(robustness.ALEXNET_ERROR, range(1, 6))
        return {f"{name}/{severity}": value for name, severity in names}

    def test_alexnet_itself_has_100(self):
        top1: dict[str, float] = {}
        for name, error in robustness.ALEXNET_ERROR.items():
            top1 |= {f"{name}/{severity}": 100 * (1 - error) for severity in range(1, 6)}
        assert robustness.compute_corruption_metrics(top1)["mCE"].value == pytest.approx(100)

    def test_a_case_by_hand(self):
        """All corruptions are at 50 %; fog has different severities, of which only the mean counts."""
        top1 = self.all_at(50.0) | {f"fog/{severity}": 10.0 * severity for severity in range(1, 6)}
        ratios = [(0.7 if name == "fog" else 0.5) / error for name, error in robustness.ALEXNET_ERROR.items()]
        found = robustness.compute_corruption_metrics(top1)
        assert found["mCE"].value == pytest.approx(100 * np.mean(ratios))
        assert found["mCE"].direction == "lower"
        assert found["top1"].value == pytest.approx((14 * 50 + 30) / 15)

    def test_a_missing_severity_is_refused(self):
        top1 = self.all_at(50.0)
        del top1["snow/3"]
        with pytest.raises(UserError, match="all severities of snow"):
            robustness.compute_corruption_metrics(top1)


class TestSubsets:
    def test_numbers_sort_as_text_and_count_as_numbers(self):
        folders = sorted(map(str, range(1000)))
        assert folders[2] == "10"
        assert robustness.match_classes("imagenet-v2", folders) == [int(folder) for folder in folders]

    @pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
    def test_wordnet_ids_find_their_class(self, name):
        folders, known = sorted(robustness.load_subset_classes(name)), load_imagenet_classes()
        assert len(folders) == 200
        assert [known[place] for place in robustness.match_classes(name, folders)] == folders
        assert robustness.match_classes("imagenet-sketch", list(known)) == list(range(1000))

    def test_another_set_is_refused(self):
        a, r = (sorted(robustness.load_subset_classes(name)) for name in ("imagenet-a", "imagenet-r"))
        numbers = [str(i) for i in range(200)]
        wrong = [
            ("imagenet-a", r),
            ("imagenet-r", a),
            ("imagenet-a", a[:-1]),
            ("imagenet-r", ["cat"] * 200),
            ("imagenet-sketch", a),
            ("imagenet-a", numbers),
        ]
        for name, folders in wrong:
            with pytest.raises(UserError, match=name):
                robustness.match_classes(name, folders)

    def test_a_classifier_chooses_among_the_sets_classes(self, tmp_path, monkeypatch):
        """Four of 1000 classes: the largest logit of the others does not count."""
        known = load_imagenet_classes()
        places = [7, 100, 500, 900]
        monkeypatch.setattr(
            robustness, "load_subset_classes", lambda name: frozenset(known[place] for place in places)
        )
        for place in places:
            (tmp_path / "set" / known[place]).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (16, 16), (place % 256, 10 * number, 0)).save(
                    tmp_path / "set" / known[place] / f"{number}.png"
                )
        torch.manual_seed(0)
        model: Any = build_vit(SPEC, num_classes=1000, global_pool="avg")
        torch.nn.init.zeros_(model.head.weight)
        torch.nn.init.zeros_(model.head.bias)
        model.head.bias.data[[0, 500, 900]] = torch.tensor(
            [9.0, 5.0, 1.0]
        )  # 0 is not in the set; of those in it 500 is the largest
        torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
        source = row(tmp_path / "row", tmp_path / "x.pth", spec={"num_heads": 2})
        config = {"kind": "robustness", "set": "imagenet-a", "data": str(tmp_path / "set"), **COMMON}
        outcome = robustness.run(
            build(RobustnessConfig, config, "test"), job(tmp_path / "cell", source), Progress()
        )
        assert outcome.metrics["top1"].value == 25.0
        assert outcome.num_samples == 8
        top5 = np.load(tmp_path / "cell/predictions.npz")["top5"]
        assert set(top5[:, 0]) == {2}, "classes by their place in the set"

    def test_corruptions_in_folders(self, tmp_path, monkeypatch):
        monkeypatch.setattr(robustness, "ALEXNET_ERROR", {"fog": 0.5, "snow": 0.25})
        known = load_imagenet_classes()
        monkeypatch.setattr(robustness, "load_subset_classes", lambda name: frozenset(known[:2]))
        for corruption in ("fog", "snow", "spatter"):  # the last is one of the extra ones, which do not count
            for severity in range(1, 6):
                for place in (0, 1):
                    folder = tmp_path / "set" / corruption / str(severity) / known[place]
                    folder.mkdir(parents=True)
                    Image.new("RGB", (16, 16)).save(folder / "1.png")
        model: Any = build_vit(SPEC, num_classes=1000, global_pool="avg")
        torch.nn.init.zeros_(model.head.weight)
        model.head.bias.data = torch.arange(1000.0, 0.0, -1.0)  # always class 0
        torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
        source = row(tmp_path / "row", tmp_path / "x.pth", spec={"num_heads": 2})
        config = {"kind": "robustness", "set": "imagenet-c", "data": str(tmp_path / "set"), **COMMON}
        outcome = robustness.run(
            build(RobustnessConfig, config, "test"), job(tmp_path / "cell", source), Progress()
        )
        assert outcome.main_metric == "mCE"
        assert outcome.metrics["mCE"].value == pytest.approx(100 * (0.5 / 0.5 + 0.5 / 0.25) / 2)
        assert outcome.num_samples == 20
        assert any("does not name the classifier's classes" in note for note in outcome.notes)
        assert len(json.loads((tmp_path / "cell/corruptions.json").read_text())) == 10
