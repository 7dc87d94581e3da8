"""The number of heads: stated by the user or the file, built by the family for a size, else asked for."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from backbones.inspection import inspect_checkpoint
from backbones.load import load_backbone
from backbones.translating.infer import MissingHeads
from mae_bench.errors import UserError
from tests.backbones.formats.plain_vit import encoder_shapes, linear
from tests.backbones.formats.reference import Shapes, check_real_size, fill, prefixed


def sized(width: int, depth: int = 12, hidden: int | None = None) -> Shapes:
    return encoder_shapes(width, depth, 224, 16, hidden=hidden)


@pytest.fixture
def write(tmp_path):
    """Write a small ViT of 192 channels with other contents of the file."""

    def save(depth: int = 1, **content: Any) -> Any:
        torch.save({"state_dict": fill(encoder_shapes(192, depth, 112, 8)), **content}, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    return save


@pytest.mark.parametrize(
    ("width", "depth", "why"),
    [
        (192, 12, "3 in DeiT, 12 in MAE-Lite"),
        (384, 12, "6 in DINO, 12 in MoCo v3 and MAE-Lite"),
        (768, 8, "8 in timm 0.3.2"),
        (768, 6, "a trimmed model"),
        (512, 12, "a width of few families"),
    ],
)
@pytest.mark.parametrize("wrapper", ["state_dict", ""])
def test_a_bare_file_whose_size_has_several_numbers_asks(width, depth, why, wrapper):
    content = {wrapper: sized(width, depth)} if wrapper else sized(width, depth)
    with pytest.raises(MissingHeads) as error:
        check_real_size("timm", content)
    assert error.value.given.endswith(f"from the file (width {width}, depth {depth})"), why
    assert {3, 6, 12, 16} & set(error.value.divisors)
    assert "num_heads=N" in error.value.fix


def test_a_reconstructing_file_of_the_authors_layout_in_another_size_asks():
    """MAE-Lite and other forks of facebookresearch/mae save its layout with 12 heads of 16 channels."""
    decoder = {"mask_token": (1, 1, 96), "decoder_embed.weight": (96, 192), "decoder_embed.bias": (96,)}
    with pytest.raises(MissingHeads):
        check_real_size("official_mae", {"model": sized(192) | decoder})


MAE_LITE = {"start_epoch": 400, "best_top1": 0.0, "best_top5": 0.0, "best_top1_epoch": 0}


@pytest.mark.parametrize(("width", "depth"), [(192, 12), (192, 13), (384, 12)])
@pytest.mark.parametrize("stage", ["pretrained", "fine-tuned"])
def test_mae_lite_is_known_by_what_its_trainer_saves(width, depth, stage):
    """Its models_mae.py: "the number of heads is changed to 12 from 3"."""
    encoder = sized(width, depth)
    if stage == "pretrained":
        encoder |= {"mask_token": (1, 1, 96), "decoder_embed.weight": (96, width)}
    else:
        encoder |= {f"fc_{name}": encoder.pop(name) for name in ("norm.weight", "norm.bias")}
    content = {"model": prefixed("module.model.", encoder)}
    assert check_real_size("official_mae", content | MAE_LITE).num_heads == 12
    with pytest.raises(MissingHeads):
        check_real_size("official_mae", content | {"epoch": 400})


def test_a_model_of_timm_from_mae_lites_trainer_asks():
    content = {"model": prefixed("module.model.", sized(192) | linear("head", 192, 9))}
    with pytest.raises(MissingHeads):
        check_real_size("official_mae", content | MAE_LITE, said=True)


@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (1024, 24, 16), (1280, 32, 16)])
def test_sizes_with_one_number_in_every_family_need_no_question(width, depth, heads):
    assert check_real_size("timm", sized(width, depth)).num_heads == heads


def test_a_mlp_of_another_width_is_another_size():
    with pytest.raises(MissingHeads):
        check_real_size("timm", sized(768, 12, 2304))


def test_a_base_without_a_class_token_asks():
    """timm's vit_base_patch16_gap_224 has 16 heads of 48 channels."""
    content = encoder_shapes(768, 12, 224, 16, tokens=())
    with pytest.raises(MissingHeads):
        check_real_size("timm", content, overrides={"options": {"act_layer": "gelu"}})


def test_one_size_has_other_heads_in_another_family():
    backbone = prefixed("backbone.", sized(384))
    dino = {**backbone, "head.last_layer.weight_g": (65536, 1), "head.last_layer.weight_v": (65536, 256)}
    assert check_real_size("dino", dino).num_heads == 6
    moco = {"state_dict": prefixed("module.base_encoder.", sized(384))}
    assert check_real_size("moco_v3", moco).num_heads == 12


@pytest.mark.parametrize(
    ("content", "heads"),
    [
        ({"args": Namespace(model="x", model_kwargs={"num_heads": 12})}, 12),
        ({"args": {"model_kwargs": {"num_heads": 6}}}, 6),
        ({"hyper_parameters": {"backbone": {"kwargs": {"num_heads": 24}}}}, 24),
        ({"model_args": {"num_heads": 8}}, 8),
        ({"arch": "vit_tiny_patch16_224", "args": Namespace(model_kwargs={"num_heads": 2, "depth": 1})}, 2),
        (
            {"args": Namespace(model="vit_tiny_patch16_224", model_kwargs={"depth": 1})},
            3,
        ),
    ],
)
def test_what_the_file_states_is_listened_to(write, content, heads):
    path = write(**content)
    assert load_backbone(path)[1].num_heads == heads
    assert inspect_checkpoint(path)["origins"]["num_heads"] == "stated by the file"


def test_the_user_comes_before_the_file_and_the_file_before_the_family(write):
    path = write(args=Namespace(model_kwargs={"num_heads": 12}))
    assert load_backbone(path, overrides={"num_heads": 6})[1].num_heads == 6
    head = {"head.last_layer.weight_g": (9, 1), "head.last_layer.weight_v": (9, 4)}
    content = {**prefixed("backbone.", sized(384)), **head}
    stated = {"teacher": content, "args": Namespace(arch="vit_small")}
    assert check_real_size("dino", stated).num_heads == 6
    stated["args"] = Namespace(num_heads=12)
    assert check_real_size("dino", stated).num_heads == 12


def test_a_number_that_does_not_divide_the_width_is_refused(write):
    with pytest.raises(UserError, match=r"x.pth: embed_dim 192 is not divisible by num_heads 7\nExpected: "):
        load_backbone(write(args=Namespace(num_heads=7)))


def test_heads_of_a_decoder_or_a_predictor_are_not_the_encoders(write):
    args = Namespace(decoder_num_heads=16, predictor={"num_heads": 6}, pred_num_heads=4)
    with pytest.raises(MissingHeads):
        load_backbone(write(args=args))


def test_a_name_whose_size_is_not_the_files_is_no_evidence(write):
    with pytest.raises(MissingHeads):
        load_backbone(write(arch="vit_base_patch16_224"))


@pytest.mark.parametrize("width", [384, 192])
def test_a_name_of_the_family_states_the_heads_of_its_width_only(width):
    head = {"head.last_layer.weight_g": (9, 1), "head.last_layer.weight_v": (9, 4)}
    trimmed = {**prefixed("backbone.", sized(width, 5)), **head}
    content = {"teacher": trimmed, "args": Namespace(arch="vit_small")}
    if width == 384:
        assert check_real_size("dino", content).num_heads == 6
        return
    with pytest.raises(MissingHeads):
        check_real_size("dino", content)


def test_vit_small_of_timm_0_3_2_has_8_heads_of_96_channels():
    """timm 0.3.2 built vit_small_patch16_224 with 768 channels and 8 blocks, today's timm with 384 and 12."""
    content = {"state_dict": sized(768, 8, 2304), "arch": "vit_small_patch16_224", "epoch": 3}
    assert check_real_size("timm", content).num_heads == 8
    today = {"state_dict": sized(384), "arch": "vit_small_patch16_224", "epoch": 3}
    assert check_real_size("timm", today).num_heads == 6


def test_an_assumption_is_noted(tmp_path):
    torch.save(fill(sized(768) | linear("head", 768, 5)), tmp_path / "x.pth")
    _, spec, report = load_backbone(tmp_path / "x.pth")
    assert spec.num_heads == 12
    assert any(note.startswith("12 heads, assumed: every known family") for note in report.notes)
    origin = inspect_checkpoint(tmp_path / "x.pth")["origins"]["num_heads"]
    assert origin.startswith("assumed: ")
    given = load_backbone(tmp_path / "x.pth", overrides={"num_heads": 6})
    assert given[1].num_heads == 6
