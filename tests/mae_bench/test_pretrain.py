"""The pretraining job end to end at toy size: what it leaves, that it repeats, and what it says of bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.load import load_backbone
from backbones.mae import load_mae
from mae_bench.config import build
from mae_bench.errors import Interrupted, UserError
from mae_bench.job import Job, Outcome
from mae_bench.pretrain import run, run_random
from mae_bench.pretrain_config import PretrainConfig, RandomConfig
from mae_bench.progress import Progress
from mae_bench.reconstruct import GREY, reconstruct, reconstruct_files

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
    model = load_mae(tmp_path / "run")
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name]), name
    assert outcome.num_samples == 6
    assert outcome.metrics["loss"].direction == "lower"
    with Image.open(tmp_path / "run" / outcome.artefacts["reconstruction"]) as picture:
        assert picture.width > picture.height, "two rows of three"
    assert not (tmp_path / "run" / "state.pt").exists()


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
        digests.append(run_random(config, Job(name, "random", {}, tmp_path / name, seed), Progress()).backbone_digest)
    assert digests[0] == digests[1] != digests[2]


def test_reconstruction_keeps_visible_pixels_and_greys_removed_ones(data: Path, tmp_path: Path) -> None:
    pretrain(data, tmp_path / "run")
    model = load_mae(tmp_path / "run")
    imgs = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    noise = torch.rand(2, 16)
    original, masked, painted = reconstruct(model, imgs, 0.75, noise)
    removed = model.unpatchify(model(imgs.float(), 0.75, noise)[2][..., None].expand(2, 16, 48)).bool()
    assert removed.float().mean() == 0.75
    torch.testing.assert_close(original, imgs / 255)
    assert torch.equal(masked[~removed], original[~removed])
    assert torch.equal(painted[~removed], original[~removed])
    assert (masked[removed] == GREY).all()


def test_reconstruct_needs_a_decoder_and_images(data: Path, tmp_path: Path) -> None:
    pretrain(data, tmp_path / "run")
    with pytest.raises(UserError, match="no masked autoencoder"):
        load_mae(tmp_path / "run" / "export" / "backbone.safetensors")
    model = load_mae(f"run:{tmp_path / 'run'}")
    (tmp_path / "text.jpg").write_text("words")
    with pytest.raises(UserError, match=r"text\.jpg"):
        reconstruct_files(model, [tmp_path / "text.jpg"], tmp_path / "out.png")
    with pytest.raises(UserError, match=r"\.png"):
        reconstruct_files(model, [next((data / "val").rglob("*.png"))], tmp_path / "out.jpg")
    reconstruct_files(model, [next((data / "val").rglob("*.png"))], tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").width > 3 * 90
