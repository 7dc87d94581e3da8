"""Suggested preprocessing: the known answer of a synthetic backbone is found, ties are reported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from backbones.load import ReadOptions, load_backbone
from backbones.preprocessing import Suggestion, render, score_candidates, suggest_preprocessing, verdict
from backbones.probe import KNN, MIN_IMAGES, RETRIEVAL, build_probe, draw_sample
from mae_bench.errors import UserError
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec
from tests.backbones.formats.reference import randomise

pytestmark = pytest.mark.usefixtures("toy_heads")

SPEC = BackboneSpec("vit", (16, 16), (8, 8), 3, 4, 1, 1)
LEVELS = (77, 102, 128)  # red of the three classes, 0.3 to 0.5: not negative in [0, 1] alone


class Synthetic(nn.Module):
    """Show the class (red) only for positive inputs and in one kind of token; green, without meaning, in all.

    shows: the kind of token that has the class. N images, tokens (N, 1 + 4, 4).
    """

    def __init__(self, shows: str):
        super().__init__()
        self.shows, self.fc_norm = shows, nn.Identity()
        self.norm: nn.Module = nn.Identity()

    def forward_features(self, imgs):
        red, green = imgs[:, 0].mean((1, 2)), imgs[:, 1].mean((1, 2))
        seen = torch.stack(
            [red.clamp(min=0) * 8, torch.zeros_like(red), green * 0.1, torch.ones_like(red)], dim=1
        )
        blind = torch.stack(
            [torch.zeros_like(red), torch.zeros_like(red), green, torch.ones_like(red)], dim=1
        )
        first, others = (seen, blind) if self.shows == "token" else (blind, seen)
        return torch.stack([first, *[others] * 4], dim=1)


def score(model: nn.Module, spec: BackboneSpec, folder: Path) -> Suggestion:
    return score_candidates(model, spec, build_probe(spec, draw_sample(folder, 256)))


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """60 images of 3 classes: red is the class's, green is drawn."""
    folder, draw = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for number in range(60):
        place = folder / "train" / "abc"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (LEVELS[number % 3], int(draw.integers(0, 256)), 0)).save(
            place / f"{number}.png"
        )
    return folder


@pytest.fixture(scope="session")
def textures(tmp_path_factory):
    """32 images without classes, each of a colour and a gradient of its own."""
    folder, draw = tmp_path_factory.mktemp("textures"), np.random.default_rng(1)
    for number in range(32):
        colour = draw.integers(0, 256, 3)
        pixels = np.tile(np.linspace(0.8, 1, 40)[:, None, None] * colour, (1, 40, 1)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("shows", ["token", "avg"])
def test_the_known_answer_is_found(classes, shows):
    found = score(Synthetic(shows), SPEC, classes)
    assert (found.measure, found.images) == (KNN, 60)
    assert (found.best.normalisation, found.best.global_pool, found.best.score) == ("[0, 1]", shows, 1.0)
    assert found.clear
    scores = {(row.normalisation, row.global_pool): row.score for row in found.candidates}
    assert len(scores) == 8
    assert all(score < 0.7 for key, score in scores.items() if key != ("[0, 1]", shows))
    assert (found.present.normalisation, found.present.global_pool) == ("imagenet", "token")
    assert found.present.behind == pytest.approx(1 - found.present.score)
    assert 0 < found.present.low < found.present.behind < found.present.high
    assert f"global_pool={shows}" in verdict(found)
    assert "'mean=[0,0,0]' 'std=[1,1,1]'" in verdict(found)
    assert "nothing was applied" in verdict(found)


def test_a_tie_is_no_suggestion(classes):
    class Blind(Synthetic):
        def forward_features(self, imgs):
            return torch.ones(len(imgs), 5, 4)

    found = score(Blind("token"), SPEC, classes)
    assert not found.clear
    assert found.best == found.present, "among equals the present reading goes first"
    assert len({row.score for row in found.candidates}) == 1
    assert "keep it" in verdict(found)


def test_the_norm_is_tried_with_and_without(classes):
    model = Synthetic("avg")
    model.norm = norm = nn.LayerNorm(4)
    nn.init.zeros_(norm.weight)  # makes every image the same
    found = score(model, SPEC, classes)
    assert {row.norm for row in found.candidates} == {True, False}
    assert not found.best.norm
    assert all(row.score < 0.7 for row in found.candidates if row.norm)
    assert found.present.norm, "as it is read"
    assert model.norm is norm


def test_without_classes_crops_find_each_other(textures):
    spec = BackboneSpec(
        "vit", (16, 16), (8, 8), 3, 4, 1, 1, num_prefix_tokens=1, mean=(0.1,) * 3, std=(1.0,) * 3
    )

    class Colour(Synthetic):
        """The average has the colour, the class token nothing."""

        def forward_features(self, imgs):
            colour = torch.cat([imgs.mean((2, 3)), torch.ones(len(imgs), 1)], dim=1)
            return torch.stack([torch.ones_like(colour), *[colour] * 4], dim=1)

    found = score(Colour("avg"), spec, textures)
    assert (found.measure, found.images) == (RETRIEVAL, 32)
    assert found.best.global_pool == "avg"
    assert found.best.score > 0.6
    assert all(row.score == 1 / 32 for row in found.candidates if row.global_pool == "token")
    assert found.present.normalisation == "the checkpoint's"
    assert len({row.normalisation for row in found.candidates}) == 5


def test_a_checkpoint_is_probed_and_stays_as_it_is(tmp_path, classes):
    spec = BackboneSpec("vit", (16, 16), (8, 8), 3, 192, 1, 3)
    save_file(randomise(build_vit(spec)).state_dict(), tmp_path / "x.safetensors")
    options: ReadOptions = {"format": "timm", "overrides": {"num_heads": 3, "img_size": 16}}
    found = suggest_preprocessing(tmp_path / "x.safetensors", classes, max_images=24, **options)
    assert found.images == 24
    assert len(found.candidates) == 4 * 2 * 2
    expected = found.to_dict()
    assert json.loads(json.dumps(expected, allow_nan=False))["applied"] is False
    assert load_backbone(tmp_path / "x.safetensors", **options)[1].mean == (0.485, 0.456, 0.406)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(found))
    text = console.export_text()
    assert "(current)" in text
    assert "a suggestion from 24 images" in text


def test_a_sample_is_of_the_validation_split_and_skips_bad_images(tmp_path, classes):
    for split, count in {"train": 3, "val": 5}.items():
        (tmp_path / split).mkdir()
        for number in range(count):
            Image.new("RGB", (16, 16)).save(tmp_path / split / f"{number}.png")
    (tmp_path / "val" / "4.png").write_bytes(b"no image")
    sample = draw_sample(tmp_path, 10)
    assert (len(sample.indices), sample.targets) == (5, None)
    imgs, which = sample.load_view(lambda image: torch.zeros(3, 2, 2, dtype=torch.uint8))
    assert (len(imgs), which.tolist()) == (4, [0, 1, 2, 3])
    drawn = draw_sample(classes, 30)
    assert len(set(drawn.indices)) == 30
    assert drawn.targets is not None
    assert torch.bincount(drawn.targets).min() > 3, "not the first classes alone"


@pytest.mark.parametrize(
    ("channels", "count", "expected"),
    [(3, MIN_IMAGES - 1, f"at least {MIN_IMAGES}"), (4, MIN_IMAGES, "takes 4 channels"), (3, 0, "no images")],
)
def test_what_cannot_be_probed_says_why(tmp_path, channels, count, expected):
    spec = BackboneSpec(
        "vit", (16, 16), (8, 8), channels, 192, 1, 3, mean=(0.5,) * channels, std=(0.5,) * channels
    )
    save_file(build_vit(spec).state_dict(), tmp_path / "x.safetensors")
    (tmp_path / "images").mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / f"{number}.png")
    given = {"mean": spec.mean, "std": spec.std, "num_heads": 3, "img_size": 16}
    with pytest.raises(UserError, match=expected):
        suggest_preprocessing(tmp_path / "x.safetensors", tmp_path / "images", format="timm", overrides=given)
