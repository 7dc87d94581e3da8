"""UperNet end to end on a tiny data set with mmsegmentation: outcome, resume, faults."""

import json
import shutil
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mae_bench.config import CONFIGS, build, load_yaml
from mae_bench.errors import Interrupted, NotInstalled, UserError
from mae_bench.job import Job
from mae_bench.progress import Progress
from tasks.ade20k.config import UPerNetConfig

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

from mmengine.config import Config
from mmengine.runner import IterBasedTrainLoop
from mmseg.registry import MODELS
from PIL import Image
from safetensors.torch import load_file

from tasks.ade20k.upernet import run

pytestmark = [pytest.mark.framework, pytest.mark.slow]

SETTINGS = {
    "kind": "upernet",
    "protocol": "upernet-test",
    "crop_size": 32,
    "img_scale": (64, 40),
    "iterations": 4,
    "global_batch_size": 2,
    "lr": 1e-3,
    "warmup_iterations": 2,
    "amp_dtype": "float32",
    "head_channels": 8,
    "pool_scales": (1, 2),
    "aux_channels": 4,
    "test_mode": "whole",
    "checkpoint_seconds": 0,
    "max_bad_images": 0,
}


class StopAfter(Progress):
    """Ask for a stop after that many training steps or when a stage begins; keep all reports."""

    def __init__(self, steps: int | None = None, before: str = ""):
        super().__init__()
        self.steps, self.before = steps, before
        self.seen: list[Any] = []
        self.notes: list[str] = []

    @property
    def should_stop(self) -> bool:
        return (self.steps is not None and self.done >= self.steps) or self._stop

    def stage(self, name, total=0):
        self._stop = name == self.before
        super().stage(name, total)

    @property
    def done(self) -> float:
        return max([done for stage, done, _ in self.seen if stage == "train"], default=0)

    def step(self, done, **values):
        self.seen.append((self._stage, done, values))
        super().step(done, **values)

    def note(self, message):
        self.notes.append(message)


@pytest.fixture
def work(ade20k, backbone, tmp_path):
    def start(folder="job", progress=None, seed=3, earlier=(), **changes):
        config = UPerNetConfig(**{**SETTINGS, "data": str(ade20k), **changes})
        job = Job("segment", "upernet", config.model_dump(mode="json"), tmp_path / folder, seed, backbone)
        job = replace(job, earlier=tuple(tmp_path / name for name in earlier))
        return run(config, job, progress or StopAfter())

    return start


@pytest.fixture
def train_only(work, tmp_path):
    """A function that trains to the end, stops before the evaluation and returns the weights."""

    def start(folder="job", progress=None, **changes):
        with pytest.raises(Interrupted):
            work(folder, progress or StopAfter(before="evaluate"), **changes)
        return weights(tmp_path / folder)

    return start


def weights(folder) -> dict[str, torch.Tensor]:
    return load_state(folder)["state_dict"]


def load_state(folder) -> dict[str, Any]:
    """Return the job's last training state."""
    return torch.load(sorted(folder.glob("checkpoints/step-*/state.pth"))[-1], weights_only=True)


def test_outcome(work, tmp_path, capfd):
    progress = StopAfter()
    outcome = work(progress=progress, checkpoint_seconds=1000)
    assert (outcome.task, outcome.split, outcome.num_samples, outcome.main_metric) == (
        "ade20k",
        "validation",
        3,
        "mIoU",
    )
    assert set(outcome.metrics) == {"mIoU", "mAcc", "aAcc"}
    assert all(0 <= metric.value <= 100 for metric in outcome.metrics.values())
    assert outcome.backbone_spec["embed_dim"] == 16
    assert len(outcome.backbone_digest) == 64
    assert {"seconds_train", "seconds_eval", "images_per_second", "params", "peak_memory_mib"} <= set(
        outcome.cost
    )
    assert [done for stage, done, _ in progress.seen if stage == "train"] == [1, 2, 3, 4]
    assert [done for stage, done, _ in progress.seen if stage == "evaluate"] == [1, 2, 3]
    assert [values["lr"] for stage, _, values in progress.seen if stage == "train"] == pytest.approx(
        [1e-9, 1e-3, 1e-3, 0]
    )
    assert "".join(capfd.readouterr()) == ""  # the frameworks write only to the log
    job = tmp_path / "job"
    assert "per class results" in (job / "mmseg.log").read_text()
    dumped = Config.fromfile(job / "mmseg_config.py")
    assert dumped.model.decode_head.num_classes == 3
    MODELS.build(dumped.model).load_state_dict(load_file(job / outcome.artefacts["trained"]))
    assert [row["class"] for row in json.loads((job / "per_class.json").read_text())] == [
        "sky",
        "grass",
        "ball",
    ]
    with np.load(job / "per_image.npz") as saved:
        assert list(saved["names"]) == ["0.jpg", "1.jpg", "2.jpg"]
        assert (
            saved["areas"][:, 3].sum() == 3 * 36 * 40
        )  # every labelled pixel at the images' own size, none of label 0
    assert all((job / path).is_file() for path in outcome.artefacts.values())


def test_a_stopped_run_resumes_to_the_same_weights(work, train_only, tmp_path):
    with pytest.raises(Interrupted):
        work("stopped", StopAfter(2), drop_path=0.5, checkpoint_seconds=1000)
    assert load_state(tmp_path / "stopped")["meta"]["iter"] == 2
    progress = StopAfter(before="evaluate")
    resumed = train_only("stopped", progress, drop_path=0.5, checkpoint_seconds=1000)
    assert [done for stage, done, _ in progress.seen if stage == "train"] == [3, 4]
    whole = train_only("whole", drop_path=0.5, checkpoint_seconds=1000, num_workers=1)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    again = StopAfter()
    assert work("stopped", again, drop_path=0.5).metrics == work("whole", drop_path=0.5).metrics
    assert again.done == 0  # a finished training is only evaluated


def test_seed_decides(train_only):
    runs = [
        train_only(folder, seed=seed, iterations=2, warmup_iterations=0)
        for folder, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    a, b, c = (run["decode_head.conv_seg.weight"] for run in runs)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_states_are_passed_over(work, train_only, tmp_path):
    whole = train_only("whole")
    with pytest.raises(Interrupted):
        work("one", StopAfter(3))
    shutil.copytree(tmp_path / "one", tmp_path / "both")
    for folder, steps in (("one", [3, 4]), ("both", [1, 2, 3, 4])):
        states = sorted(tmp_path.glob(f"{folder}/checkpoints/step-*/state.pth"))
        damaged = states[-1:] if folder == "one" else states
        for path in damaged:
            flip(path)
        progress = StopAfter(before="evaluate")
        resumed = train_only(folder, progress)
        assert [done for stage, done, _ in progress.seen if stage == "train"] == steps
        assert all(f"{path.parent} cannot be read" in "".join(progress.notes) for path in damaged)
        assert ("starts from the beginning" in progress.notes[-1]) == (folder == "both")
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


class TestTrainedModelsAreEvaluatedAgain:
    def test_after_a_correction_of_a_validation_map(self, work, ade20k, tmp_path):
        tear(ade20k / "images" / "training" / "1.jpg")
        first = work("first", max_bad_images=0.4)
        path = ade20k / "annotations" / "validation" / "0.png"
        Image.fromarray(np.maximum(np.asarray(Image.open(path)), 1)).save(path)
        progress = StopAfter()
        second = work(
            "second", progress, earlier=["first"], max_bad_images=0.4, test_mode="slide", test_stride=24
        )
        assert [stage for stage, *_ in progress.seen if stage == "train"] == []
        fresh = work("fresh", max_bad_images=0.4, test_mode="slide", test_stride=24)
        assert second.metrics == fresh.metrics
        assert second.metrics != first.metrics
        assert second.cost["seconds_train"] == first.cost["seconds_train"]
        assert second.notes[0].startswith(f"evaluated the model that {tmp_path.name}/first trained on ")
        assert second.notes[1:] == fresh.notes != []
        kept = [
            tmp_path / folder / "trained" / "model.safetensors" for folder in ("first", "second", "fresh")
        ]
        assert tmp_path / "second" / second.artefacts["trained"] == kept[1]
        assert kept[0].read_bytes() == kept[1].read_bytes()
        weights = [load_file(path) for path in kept[1:]]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1])

    def test_but_not_if_the_training_would_differ_or_the_model_is_damaged(self, work, ade20k, tmp_path):
        with pytest.raises(Interrupted):  # what is trained is kept before it is evaluated
            work("first", StopAfter(before="evaluate"))

        def notes_of_training():
            progress = StopAfter(1)
            with pytest.raises(Interrupted):
                work("second", progress, earlier=["first"])
            shutil.rmtree(tmp_path / "second")
            return progress.notes

        kept = tmp_path / "first" / "trained" / "model.safetensors"
        flip(kept)
        (note,) = notes_of_training()
        assert str(kept) in note
        flip(kept)
        path = ade20k / "annotations" / "training" / "0.png"
        Image.fromarray(np.maximum(np.asarray(Image.open(path)), 1)).save(path)
        assert notes_of_training() == []

    def test_unless_nothing_was_to_be_kept(self, work, tmp_path):
        outcome = work(keep_weights=False, iterations=3)
        assert "trained" not in outcome.artefacts
        assert not (tmp_path / "job" / "trained").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(work, tmp_path, monkeypatch):
    step = IterBasedTrainLoop.run_iter

    def poison(loop, batch):
        if loop.iter == 2:
            batch["inputs"][0] = batch["inputs"][0].float() * torch.nan
        step(loop, batch)

    monkeypatch.setattr(IterBasedTrainLoop, "run_iter", poison)
    with pytest.raises(
        UserError, match=r"iteration 3 of 4: loss nan(.|\n)*last good training state is .*step-00000002"
    ):
        work()
    assert load_state(tmp_path / "job")["meta"]["iter"] == 2
    assert all(value.isfinite().all() for value in weights(tmp_path / "job").values())


def tear(image):
    """Cut off the end of a file; its header still states the size."""
    image.write_bytes(image.read_bytes()[: image.stat().st_size * 4 // 5])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_do_not_decode_are_named_and_left_out(work, ade20k, tmp_path, num_workers):
    torn = ade20k / "images" / "training" / "1.jpg"
    tear(torn)
    tear(ade20k / "images" / "validation" / "2.jpg")
    progress = StopAfter()
    outcome = work(progress=progress, max_bad_images=0.4, num_workers=num_workers)
    assert outcome.num_samples == 2
    heads = ["training: 1 of 6 images did not decode", "validation: 1 of 3 images did not decode"]
    assert [note.rpartition(": ")[0] for note in outcome.notes] == heads
    assert any(str(torn) in note for note in progress.notes)
    assert "2.jpg" in (tmp_path / "job" / "bad_images_validation.txt").read_text()


def test_images_that_do_not_decode_are_still_counted_after_a_stop(work, train_only, ade20k):
    torn = ade20k / "images" / "training" / "1.jpg"
    tear(torn)
    train_only(max_bad_images=0.4)
    assert [str(torn) in note for note in work(max_bad_images=0.4).notes] == [True]


@pytest.mark.parametrize("split", ["training", "validation"])
def test_too_many_images_that_do_not_decode(work, ade20k, split):
    for image in (ade20k / "images" / split).iterdir():
        tear(image)
    with pytest.raises(UserError, match=r"images did not decode(.|\n)*max_bad_images"):
        work()


def test_images_that_mmsegmentation_would_skip_are_an_error(work, ade20k):
    image = ade20k / "images" / "training" / "0.jpg"
    image.rename(image.with_suffix(".jpeg"))
    with pytest.raises(UserError, match=r"are not \*.jpg: 0.jpeg"):
        work()


def test_slide_and_bfloat16_on_images_that_the_patch_does_not_divide(work, ade20k):
    Image.open(ade20k / "images" / "validation" / "0.jpg").resize((61, 47)).save(
        ade20k / "images" / "validation" / "0.jpg"
    )
    label = Image.open(ade20k / "annotations" / "validation" / "0.png").resize(
        (61, 47), Image.Resampling.NEAREST
    )
    label.save(ade20k / "annotations" / "validation" / "0.png")
    outcome = work(
        iterations=3,
        test_mode="slide",
        test_stride=24,
        amp_dtype="bfloat16",
        img_scale=(80, 45),
        aux_channels=0,
    )
    assert outcome.num_samples == 3


def test_label_0_takes_no_part_in_the_loss(work, ade20k, tmp_path):
    """Three steps of two see each of six images once: only the step with the labelled one has a loss."""
    for path in sorted((ade20k / "annotations" / "training").iterdir())[1:]:
        Image.fromarray(np.zeros((40, 44), np.uint8)).save(path)
    progress = StopAfter()
    work(progress=progress, iterations=3)
    losses = sorted(values["loss"] for stage, _, values in progress.seen if stage == "train")
    assert losses[:2] == [0, 0]
    assert losses[2] > 0


def test_a_warmup_of_one_iteration_is_none(work):
    progress = StopAfter()
    work(progress=progress, iterations=3, warmup_iterations=1)
    assert [values["lr"] for stage, _, values in progress.seen if stage == "train"] == pytest.approx(
        [1e-3, 5e-4, 0]
    )


def test_crop_must_fit_the_patch(work):
    with pytest.raises(UserError, match=r"set tasks\.NAME\.crop_size=40"):
        work(crop_size=36)


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_iterations": 4},
        {"ratio_range": (2, 1)},
        {"test_mode": "slide", "test_stride": 33},
        {"global_batch_size": 1},
        {"img_scale": (0, 1)},
    ],
)
def test_contradictions_in_the_config_are_refused(wrong):
    with pytest.raises(UserError, match=next(reversed(wrong))):
        build(UPerNetConfig, {**SETTINGS, "data": "x", **wrong}, "test")


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "tasks" / "ade20k").glob("*.yaml")), ids=lambda path: path.stem
)
def test_packaged_configs_are_valid(path):
    assert build(UPerNetConfig, load_yaml(path, ["data=x"]), str(path)).kind == "upernet"


def test_missing_mmseg_is_a_cell_not_installed(monkeypatch):
    from mae_bench.registry import kind, load_object

    monkeypatch.setitem(sys.modules, "mmengine.model", None)
    for module in ("backbones.adapters.mmseg", "tasks.ade20k.upernet"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(NotInstalled, match="make setup"):
        load_object(kind("upernet").run)
