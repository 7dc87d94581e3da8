"""The pretraining job end to end at toy size: outputs, reproducibility and errors for bad input."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.load import load_backbone
from backbones.mae import load_mae
from mae_bench.config import build
from mae_bench.errors import Interrupted, UserError
from mae_bench.job import Job, Outcome
from mae_bench.models.options import MAEOptions
from mae_bench.pretrain.config import PretrainConfig, RandomConfig
from mae_bench.pretrain.job import run, run_random
from mae_bench.pretrain.reconstruct import GREY, reconstruct, reconstruct_files
from mae_bench.progress import Progress
from tests.parity import assert_within_rounding

MODEL = {"img_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 1, "num_heads": 2}
VALUES = {
    "kind": "pretrain",
    "protocol": "toy",
    "model": MODEL,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "epochs": 2,
    "base_lr": 0.01,
    "global_batch_size": 4,
    "num_reconstructions": 2,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for split, count in (("train", 12), ("val", 6)):
        for number in range(count):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 255, (18, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def pretrain(data: Path, folder: Path, seed: int = 0, **changes: object) -> Outcome:
    folder.mkdir(exist_ok=True)
    config = build(PretrainConfig, {**VALUES, "data": str(data), **changes}, "test")
    return run(config, Job("toy", "pretrain", {}, folder, seed), Progress())


def test_leaves_a_backbone_an_autoencoder_and_a_picture(data: Path, tmp_path: Path) -> None:
    outcome = pretrain(data, tmp_path / "run")
    vit, spec, report = load_backbone(tmp_path / "run" / "export")
    assert report.digest == outcome.backbone_digest
    assert spec.pretrain_method == "mae"
    model = load_mae(tmp_path / "run")[0]
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name]), name
    assert outcome.num_samples == 6
    assert outcome.metrics["loss"].direction == "lower"
    with Image.open(tmp_path / "run" / outcome.artefacts["reconstruction"]) as picture:
        assert picture.width > picture.height, "two rows of three"
    assert (tmp_path / "run" / "checkpoints").is_dir(), "until the record is there"


def test_repeats_and_depends_on_the_seed(data: Path, tmp_path: Path) -> None:
    digests = [pretrain(data, tmp_path / str(i), seed).backbone_digest for i, seed in enumerate((0, 0, 1))]
    assert digests[0] == digests[1] != digests[2]


def test_interrupted_and_run_again_gives_the_same_weights(data: Path, tmp_path: Path) -> None:
    class StopsAt(Progress):
        @property
        def should_stop(self) -> bool:
            return self._stop

        def step(self, done: float, **values: float | str) -> None:
            self._stop = done == 3
            super().step(done, **values)

    whole = pretrain(data, tmp_path / "whole")
    config = build(PretrainConfig, {**VALUES, "data": str(data), "checkpoint_seconds": 0}, "test")
    (tmp_path / "parts").mkdir()
    job = Job("toy", "pretrain", {}, tmp_path / "parts", 0)
    with pytest.raises(Interrupted):
        run(config, job, StopsAt())
    assert run(config, job, Progress()).backbone_digest == whole.backbone_digest


def test_unreadable_image_is_an_error_beyond_the_limit(data: Path, tmp_path: Path) -> None:
    (data / "train" / "class0" / "4.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="max_bad_images"):
        pretrain(data, tmp_path / "strict")
    outcome = pretrain(data, tmp_path / "lenient", max_bad_images=0.1)
    assert any("4.png" in note for note in outcome.notes)


def test_images_that_do_not_decode_are_not_drawn_but_the_next_ones(data: Path, tmp_path: Path) -> None:
    for name in ("class0/0.png", "class1/1.png"):
        (data / "val" / name).write_bytes(b"not an image")
    outcome = pretrain(data, tmp_path / "some", max_bad_images=0.5)
    assert outcome.num_samples == 4
    with Image.open(tmp_path / "some" / outcome.artefacts["reconstruction"]) as picture:
        assert picture.height == 2 * 6 * (16 + 4) - 4 * 6, "two rows"


def test_missing_data_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        pretrain(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_loss_that_is_not_finite_stops_the_job(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at step"):
        pretrain(data, tmp_path / "run", base_lr=1e30, epochs=20)


def test_random_floor_depends_on_its_seed_alone(tmp_path: Path) -> None:
    config = build(RandomConfig, {"kind": "random", "model": MODEL}, "test")
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        digests.append(
            run_random(config, Job(name, "random", {}, tmp_path / name, seed), Progress()).backbone_digest
        )
    assert digests[0] == digests[1] != digests[2]


def test_reconstruction_keeps_visible_pixels_and_greys_removed_ones(data: Path, tmp_path: Path) -> None:
    pretrain(data, tmp_path / "run")
    model = load_mae(tmp_path / "run")[0]
    imgs = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    noise = torch.rand(2, 16)
    original, masked, painted = reconstruct(model, imgs, 0.75, noise)
    removed = model.unpatchify(model(imgs.float(), 0.75, noise)[2][..., None].expand(2, 16, 48)).bool()
    assert removed.float().mean() == 0.75
    assert_within_rounding(original, imgs / 255, roundings=16)  # normalised and back
    assert torch.equal(masked[~removed], original[~removed])
    assert torch.equal(painted[~removed], original[~removed])
    assert (masked[removed] == GREY).all()


def test_reconstruct_needs_a_decoder_and_images(data: Path, tmp_path: Path) -> None:
    pretrain(data, tmp_path / "run")
    with pytest.raises(UserError, match="no masked autoencoder"):
        load_mae(tmp_path / "run" / "export" / "backbone.safetensors")[0]
    model = load_mae(f"run:{tmp_path / 'run'}")[0]
    (tmp_path / "text.jpg").write_text("words")
    with pytest.raises(UserError, match=r"text\.jpg"):
        reconstruct_files(model, [tmp_path / "text.jpg"], tmp_path / "out.png")
    with pytest.raises(UserError, match=r"\.png"):
        reconstruct_files(model, [next((data / "val").rglob("*.png"))], tmp_path / "out.jpg")
    reconstruct_files(model, [next((data / "val").rglob("*.png"))], tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").width > 3 * 90


def test_every_axis_trains_and_is_what_the_autoencoder_says(data: Path, tmp_path: Path) -> None:
    axes: list[dict[str, Any]] = [
        {"mask_sampling": "block", "mask_ratio": 0.5},
        {"mask_sampling": "grid"},
        {"encoder_mask_tokens": True},
        {"target": "pca", "num_pca": 8},
        {"target": "hog"},
        {"norm_pix_loss": False, "loss_on": "all"},
        {"activation_checkpointing": True},
        {"augment": "none"},
        {"augment": "crop", "crop_on": "device"},
        {"color_jitter": 0.4, "decode": "exact"},
    ]
    digests = {}
    for number, axis in enumerate(axes):
        outcome = pretrain(data, tmp_path / str(number), **axis)
        digests[str(axis)] = outcome.backbone_digest
        options = load_mae(tmp_path / str(number))[0].options
        for key, value in axis.items():
            assert getattr(options, key, value) == value
        assert ("reconstruction" in outcome.artefacts) == (axis.get("target") != "hog")
    digests["default"] = pretrain(data, tmp_path / "default").backbone_digest
    assert digests["{'activation_checkpointing': True}"] == digests["default"], "the same numbers, recomputed"
    assert len(set(digests.values())) == len(axes), "every other axis changes what is learned"


def test_every_option_of_the_model_is_a_key_of_the_config() -> None:
    changes: dict[str, Any] = {
        "decoder_embed_dim": 24,
        "decoder_depth": 3,
        "decoder_num_heads": 3,
        "target": "pca",
        "num_pca": 5,
        "loss_on": "all",
        "mask_sampling": "grid",
        "encoder_mask_tokens": True,
        "activation_checkpointing": True,
    }
    options = build(PretrainConfig, {**VALUES, "data": "", **changes}, "test").mae_options()
    assert {field.name for field in fields(MAEOptions)} == {*changes, "norm_pix_loss", "num_tokens"}
    assert options == MAEOptions(**changes), "norm_pix_loss is for pixels only"
    assert build(PretrainConfig, {**VALUES, "data": ""}, "test").mae_options().norm_pix_loss


def test_own_images_without_classes_or_validation(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "holiday"
    folder.mkdir(parents=True)
    for number in range(8):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 24), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    model = {**MODEL, "img_size": (16, 8), "in_chans": 1, "mean": (0.5,), "std": (0.25,)}
    outcome = pretrain(tmp_path / "mine", tmp_path / "run", model=model)
    assert (outcome.split, outcome.main_metric, outcome.num_samples) == ("train", "train_loss", 8)
    vit, spec, _ = load_backbone(tmp_path / "run" / "export")
    assert vit.forward_features(torch.rand(1, 1, 16, 8)).shape == (1, 1 + 4 * 2, 16)
    assert spec.img_size == (16, 8)
    assert (tmp_path / "run" / "reconstruction.png").exists()


def test_masks_depend_on_neither_accumulation_nor_its_parts(data: Path, tmp_path: Path) -> None:
    whole = pretrain(data, tmp_path / "whole")
    parts = pretrain(data, tmp_path / "parts", device_batch_size=1)
    assert parts.metrics["loss"].value == pytest.approx(whole.metrics["loss"].value, rel=1e-4)
    assert any("4 accumulated" in note for note in parts.notes), parts.notes


def test_reconstructions_are_drawn_on_the_way(data: Path, tmp_path: Path) -> None:
    pretrain(data, tmp_path / "run", reconstruct_epochs=1)
    assert sorted(p.name for p in (tmp_path / "run" / "reconstructions").iterdir()) == [
        "step-00000003.png",
        "step-00000006.png",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.99}, "keeps 0 of 16 patches"),
        ({"model": {**MODEL, "img_size": (18, 16)}}, "not divisible by patch_size"),
        ({"model": {**MODEL, "img_size": (2, 2)}}, "not divisible by patch_size"),
        ({"model": {**MODEL, "in_chans": 4, "mean": (0.5,) * 4, "std": (0.5,) * 4}}, "4"),
        ({"global_batch_size": 50}, "global_batch_size 50 with 12 training images"),
        ({"target": "tokens"}, "tokenizer=PATH"),
        ({"target": "tokens", "tokenizer": "nowhere.pt"}, "no tokenizer nowhere.pt"),
        ({"target": "pca", "num_pca": 49}, "num_pca 49"),
    ],
)
def test_bad_input_is_one_clear_error(
    data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(data, tmp_path / "run", **changes)


def test_a_resume_from_another_architecture_keeps_the_state(data: Path, tmp_path: Path) -> None:
    class StopsAtOnce(Progress):
        def step(self, done: float, **values: float | str) -> None:
            self._stop = True
            super().step(done, **values)

    config = build(PretrainConfig, {**VALUES, "data": str(data)}, "test")
    job = Job("toy", "pretrain", {}, tmp_path / "run", 0)
    job.dir.mkdir()
    with pytest.raises(Interrupted):
        run(config, job, StopsAtOnce())
    with pytest.raises(UserError, match="another architecture"):
        pretrain(data, job.dir, decoder_embed_dim=32)
    assert run(config, job, Progress()).backbone_digest == pretrain(data, tmp_path / "whole").backbone_digest


def test_multispectral_arrays_are_pretrained_on(tmp_path: Path) -> None:
    (tmp_path / "bands").mkdir()
    for number in range(6):
        np.save(
            tmp_path / "bands" / f"{number}.npy",
            np.random.default_rng(number).random((20, 20, 5), dtype=np.float32),
        )
    model = {**MODEL, "in_chans": 5, "mean": (0.5,) * 5, "std": (0.3,) * 5}
    outcome = pretrain(tmp_path / "bands", tmp_path / "run", model=model, norm_pix_loss=False)
    assert outcome.metrics["train_loss"].value < 3, "of values whose variance is about 1"
    assert load_mae(tmp_path / "run")[0].decoder_pred.out_features == 4 * 4 * 5
