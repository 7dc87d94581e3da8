"""Suggested numbers of heads: those of trained and of constructed weights are found, random ones are not."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from backbones.attention_heads import DECODER, ENCODER, describe, render, suggest_heads
from backbones.load import load_backbone
from backbones.mae import load_mae
from backbones.probe import KNN, RETRIEVAL
from backbones.translating.heads import list_plausible
from backbones.translating.infer import MissingHeads
from mae_bench.cli.app import main
from mae_bench.data.batches.transforms import normalize
from mae_bench.errors import UserError
from mae_bench.models.mae import MAE
from mae_bench.models.options import MAEOptions
from mae_bench.models.vit import build_vit
from mae_bench.pretrain.reconstruct import draw_noise, save_mae
from mae_bench.spec import BackboneSpec

SIDE, PATCH, WIDTH = 16, 4, 32  # 1, 2 and 4 heads are plausible
TRUE, TRUE_DECODER = 4, 2
BATCH, LR = 64, 5e-3
SPEC = BackboneSpec("vit", (SIDE, SIDE), (PATCH, PATCH), 3, WIDTH, 2, TRUE, pos_embed="sincos")
OPTIONS = MAEOptions(
    decoder_embed_dim=WIDTH, decoder_depth=1, decoder_num_heads=TRUE_DECODER, norm_pix_loss=True
)


def draw_images(count: int, seed: int) -> np.ndarray:
    """Draw images (count, 3, SIDE, SIDE) of four quadrants, each of a colour and a rising or falling ramp.

    A removed patch can be told from another patch of its quadrant, which attention must find.
    """
    draw = np.random.default_rng(seed)
    colour = draw.uniform(-1, 1, (count, 3, 2, 2)).repeat(SIDE // 2, 2).repeat(SIDE // 2, 3)
    slope = draw.choice([-1.0, 1.0], (count, 1, 2, 2)).repeat(SIDE // 2, 2).repeat(SIDE // 2, 3)
    ramp = np.tile(np.linspace(-1, 1, PATCH), SIDE // PATCH)
    return np.clip(127.5 + 80 * colour + 40 * slope * ramp, 0, 255).astype(np.uint8)


def save_images(folder: Path, images: np.ndarray, margin: int = 1) -> Path:
    """Save images (N, 3, H, W) with a margin, which the central crop (SIDE / 0.875) removes again."""
    folder.mkdir(parents=True)
    edges = ((0, 0), (0, 0), (margin, margin), (margin, margin))
    for number, pixels in enumerate(np.pad(images, edges, "edge")):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number}.png")
    return folder


def build_mae(options: MAEOptions = OPTIONS) -> MAE:
    torch.manual_seed(0)
    return MAE(SPEC, options)


def name_as_the_authors(model: MAE) -> dict[str, torch.Tensor]:
    """Return the weights in facebookresearch/mae's names, in which no number of heads is stated."""
    return {name.removeprefix("encoder."): tensor.clone() for name, tensor in model.state_dict().items()}


def train(options: MAEOptions, num_steps: int) -> dict[str, torch.Tensor]:
    model = build_mae(options)
    imgs = normalize(torch.from_numpy(draw_images(4096, 1)), SPEC.mean, SPEC.std)
    draws = np.random.default_rng(3).random((num_steps, BATCH, SPEC.num_patches), np.float32)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=num_steps, pct_start=0.1)
    for step, noise in enumerate(torch.from_numpy(draws)):
        batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(imgs)
        optimizer.zero_grad()
        model(imgs[batch], 0.75, noise, scored_only=True)[0].backward()
        optimizer.step()
        schedule.step()
    return name_as_the_authors(model)


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    return train(OPTIONS, 300)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("held_out") / "images", draw_images(64, 2))


def save(path: Path, weights: dict[str, torch.Tensor], **args: Any) -> Path:
    torch.save({"model": weights} | ({"args": Namespace(**args)} if args else {}), path)
    return path


def print_plain(rendered: Any) -> str:
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rendered)
    return console.export_text()


@pytest.fixture
def mae_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`mae-bench` in this process: exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "400")
        monkeypatch.setattr(sys, "argv", ["mae-bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


def test_the_heads_of_a_trained_autoencoder_are_found(tmp_path, trained, held_out, mae_bench):
    path = save(tmp_path / "x.pth", trained, norm_pix_loss=True)
    code, _, asked = mae_bench("inspect", path)
    assert (code, f"mae-bench inspect {path} --images FOLDER" in asked) == (2, True)
    code, printed, _ = mae_bench("inspect", path, "--images", held_out, "--json")
    assert code == 0
    found = json.loads(printed)["heads"]
    assert found["best"] == {ENCODER: TRUE, DECODER: TRUE_DECODER}
    assert found["resolved"] == {ENCODER: True, DECODER: True}
    assert (found["images"], found["applied"], found["fields"]) == (64, False, [ENCODER, DECODER])
    rows = found["candidates"]
    pairs = {(row[ENCODER], row[DECODER]) for row in rows}
    assert pairs == {(heads, decoder_heads) for heads in (1, 2, 4) for decoder_heads in (1, 2, 4)}
    assert [row["score"] for row in rows] == sorted(row["score"] for row in rows)
    assert rows[0]["behind"] == rows[0]["low"] == rows[0]["high"] == 0
    for row in rows[1:]:
        assert row["behind"] == pytest.approx(row["score"] - rows[0]["score"])
        assert 0 < row["low"] < row["behind"] < row["high"]
    code, shown, _ = mae_bench("inspect", path, "--images", held_out)
    assert code == 0
    assert (
        f"num_heads={TRUE} is suggested by the reconstruction loss (normalised pixels) of 64 images" in shown
    )
    assert f"give num_heads={TRUE} to inspect or convert" in shown
    assert f"--decoder-num-heads {TRUE_DECODER} to reconstruct" in shown
    assert "Nothing was applied" in shown
    with pytest.raises(MissingHeads):
        load_backbone(path)


def test_a_score_is_the_loss_of_the_model_that_load_mae_gives(tmp_path, trained, held_out):
    """On images of one mask each, the mean of the images' losses is the loss of the batch."""
    path = save(tmp_path / "x.pth", trained, norm_pix_loss=True)
    found = suggest_heads(path, held_out)
    assert found is not None
    model = load_mae(path, decoder_num_heads=4, overrides={"num_heads": 2})[0]
    names = sorted(held_out.iterdir())
    pixels = np.stack([np.asarray(Image.open(name)).transpose(2, 0, 1)[:, 1:-1, 1:-1] for name in names])
    inputs = normalize(torch.from_numpy(pixels), SPEC.mean, SPEC.std)
    loss = model(inputs, 0.75, draw_noise(model, range(64), 0.75, 0))[0]
    row = next(row for row in found.candidates if (row.num_heads, row.decoder_num_heads) == (2, 4))
    assert row.score == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pixels_that_the_file_does_not_state_are_those_that_it_explains(
    tmp_path, trained, held_out, norm_pix_loss
):
    weights = trained if norm_pix_loss else train(replace(OPTIONS, norm_pix_loss=False), 100)
    found = suggest_heads(save(tmp_path / "x.pth", weights), held_out)
    assert found is not None
    kind = "normalised" if norm_pix_loss else "plain"
    assert found.measure == f"reconstruction loss ({kind} pixels)"
    assert any("does not state norm_pix_loss" in note for note in found.notes)


def test_a_known_number_is_not_compared(tmp_path, trained, held_out, mae_bench):
    both = {"num_heads": TRUE, "decoder_num_heads": TRUE_DECODER}
    assert suggest_heads(save(tmp_path / "stated.pth", trained, **both), held_out) is None
    save_mae(build_mae(), tmp_path)
    assert suggest_heads(tmp_path / "mae.safetensors", held_out) is None
    backbone = {name: tensor for name, tensor in trained.items() if "decoder" not in name}
    path = save(tmp_path / "backbone.pth", backbone)
    assert suggest_heads(path, held_out, overrides={"num_heads": 2}) is None
    code, printed, _ = mae_bench("inspect", path, "num_heads=2", "--images", held_out, "--json")
    answer = json.loads(printed)
    assert (code, answer["heads"], answer["spec"]["num_heads"]) == (0, None, 2)
    assert answer["suggestion"]["images"] == 64


def test_the_decoder_alone_is_compared_next_to_the_inspection(tmp_path, trained, held_out, mae_bench):
    path = save(tmp_path / "x.pth", trained, num_heads=TRUE, norm_pix_loss=True)
    answer = json.loads(mae_bench("inspect", path, "--images", held_out, "--json")[1])
    assert answer["heads"]["best"] == {DECODER: TRUE_DECODER}
    assert answer["heads"]["resolved"] == {DECODER: True}
    assert {row[ENCODER] for row in answer["heads"]["candidates"]} == {TRUE}
    assert (answer["spec"]["num_heads"], answer["suggestion"]["applied"]) == (TRUE, False)
    shown = mae_bench("inspect", path, "--images", held_out)[1]
    assert f"decoder_num_heads={TRUE_DECODER} is suggested" in shown
    assert "stated by the file" in shown


def test_an_untrained_autoencoder_is_not_resolved(tmp_path, held_out):
    found = suggest_heads(save(tmp_path / "x.pth", name_as_the_authors(build_mae())), held_out)
    assert found is not None
    assert not found.learned
    assert found.to_dict()["resolved"] == {ENCODER: False, DECODER: False}
    text = print_plain(render(found))
    assert "num_heads is not resolved" in text
    assert "better than a constant" in text
    assert "is suggested" not in text


def construct_of_two_heads() -> dict[str, torch.Tensor]:
    """Return a ViT of one block and 2 heads whose class token reads the green of the patch that is red.

    Channels of a token: 0 and 1 green and its negative, 2 and 3 red and its negative. All queries are equal.
    The first head (channels 0 to 15) finds the red patch by its channel 8 and copies green to channel 0. With
    4 heads, channel 0 has another head than channel 8. With 1 head, the second head (16 to 31) cancels the
    first.
    """
    spec = replace(SPEC, patch_size=(SIDE // 2, SIDE // 2), depth=1, num_heads=2, pos_embed="learned")
    weights = {name: torch.zeros_like(tensor) for name, tensor in build_vit(spec).state_dict().items()}
    mean = 1 / (SIDE // 2) ** 2
    for channel, (colour, sign) in enumerate([(1, 1), (1, -1), (0, 1), (0, -1)]):
        weights["patch_embed.proj.weight"][channel, colour] = sign * mean
    weights["cls_token"][..., 2:4] = torch.tensor([-1.0, 1.0])
    for norm in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        weights[f"{norm}.weight"].fill_(1)
    qkv, bias = weights["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.bias"]
    bias[8], bias[16] = 100, -100  # queries
    qkv[WIDTH + 8, 2] = qkv[WIDTH + 16, 2] = 1  # keys
    qkv[2 * WIDTH, 0] = 1  # values
    weights["blocks.0.attn.proj.weight"][0, 0] = 1
    return weights


@pytest.fixture(scope="module")
def red_quadrants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images of four quadrants, one of them red; the class is whether that one has little or much green.

    The green of the others is drawn.
    """
    folder, draw = tmp_path_factory.mktemp("red") / "train", np.random.default_rng(4)
    quadrants = np.zeros((96, 3, 2, 2), np.uint8)
    quadrants[:, 1] = draw.choice([0, 255], (96, 2, 2))
    classes, place = draw.random(96) < 0.5, draw.integers(0, 2, (96, 2))
    quadrants[np.arange(96), 0, place[:, 0], place[:, 1]] = 255
    quadrants[np.arange(96), 1, place[:, 0], place[:, 1]] = np.where(classes, 160, 90)
    images = quadrants.repeat(SIDE // 2, 2).repeat(SIDE // 2, 3)
    for name, members in (("little", ~classes), ("much", classes)):
        save_images(folder / name, images[members])
    return folder.parent


def test_the_heads_of_constructed_weights_without_a_decoder_are_found(tmp_path, red_quadrants):
    torch.save(construct_of_two_heads(), tmp_path / "x.pth")
    found = suggest_heads(tmp_path / "x.pth", red_quadrants, overrides={"img_size": SIDE})
    assert found is not None
    assert (found.measure, found.images, found.fields) == (KNN, 96, (ENCODER,))
    assert (found.best.num_heads, found.best.score) == (2, 1.0)
    assert sorted(row.num_heads for row in found.candidates) == [1, 2, 4]
    assert all(row.score < 0.9 for row in found.candidates[1:])
    assert found.resolves(ENCODER)
    assert found.candidates[1].behind == pytest.approx(1 - found.candidates[1].score)
    assert describe(found, ENCODER).startswith(
        "num_heads=2 is suggested by the leave-one-out kNN accuracy of 96"
    )
    assert "weaker evidence" in print_plain(render(found))
    assert json.loads(json.dumps(found.to_dict()))["candidates"][0]["decoder_num_heads"] is None


def test_random_weights_without_a_decoder_are_not_resolved(tmp_path, held_out):
    torch.save(build_vit(SPEC).state_dict(), tmp_path / "x.pth")
    found = suggest_heads(tmp_path / "x.pth", held_out)
    assert found is not None
    assert (found.measure, found.resolves(ENCODER)) == (RETRIEVAL, False)
    tied = next(row for row in found.candidates[1:] if row.ties)
    assert f"is the best, but {tied.num_heads} is only" in describe(found, ENCODER)


def test_images_without_contrast_are_not_resolved(tmp_path, trained):
    grey = save_images(tmp_path / "grey", np.full((16, 3, SIDE, SIDE), 128, np.uint8))
    found = suggest_heads(save(tmp_path / "x.pth", trained), grey)
    assert found is not None
    assert found.to_dict()["resolved"] == {ENCODER: False, DECODER: False}


def test_one_candidate_alone_is_not_resolved(tmp_path, held_out):
    assert list_plausible(12) == [1]
    torch.save(build_vit(replace(SPEC, embed_dim=12, num_heads=3)).state_dict(), tmp_path / "x.pth")
    found = suggest_heads(tmp_path / "x.pth", held_out)
    assert found is not None
    assert "1 is the only number with at least 8 channels per head" in describe(found, ENCODER)


def test_candidates_divide_the_width_into_heads_of_at_least_eight_channels():
    assert list_plausible(192) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert list_plausible(768)[-3:] == [48, 64, 96]


def test_too_few_images_are_refused(tmp_path, trained):
    few = save_images(tmp_path / "few", draw_images(15, 0))
    with pytest.raises(UserError, match="15 decodable images"):
        suggest_heads(save(tmp_path / "x.pth", trained), few)
