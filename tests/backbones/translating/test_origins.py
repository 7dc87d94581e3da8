"""No option is called inferred from the tensors that only the family's other files suggest."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from backbones.inspection import inspect_checkpoint
from backbones.load import load_backbone
from backbones.translating.translation import FILE, TENSORS
from mae_bench.errors import UserError

pytestmark = pytest.mark.usefixtures("toy_heads")

TOYS = {  # format and toy -> where its options come from
    "hf_siglip/vision": FILE,
    "hf_siglip/vision_bare": "assumed: gelu_pytorch_tanh, the default of transformers' SigLIP",
    "hf_dinov3/memory": "assumed: rotations of base 100, as in all published models",
    "eva02/pretrained": TENSORS,
    "eva02/without-rotations": "assumed: rotations for a grid of 16 x 16 patches",
}


def check_options(path: Path, expected: str, **options: Any) -> None:
    found = inspect_checkpoint(path, **options)
    assert found["origins"]["options"] == expected
    recorded = [line for line in found["report"]["assumptions"] if line.startswith("options {")]
    assert [line.partition("}: ")[2] for line in recorded] == (
        [] if expected in (FILE, TENSORS) else [expected]
    )


@pytest.mark.parametrize("toy", TOYS)
def test_options_that_no_tensor_shows_are_assumptions(tmp_path, toy):
    format, _, name = toy.partition("/")
    path, options = import_module(f"tests.backbones.formats.toys_{format}").write(tmp_path)[name]
    check_options(path, TOYS[toy], **options)


@pytest.mark.parametrize("scales", [False, True])
def test_a_square_number_of_rows_may_include_one_for_the_class_token(tmp_path, scales):
    """Of 36 rows and a layer scale, 36 positions are assumed; the error for a grid of 35 says so."""
    torch.manual_seed(0)
    sizes: Any = {"patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3, "num_classes": 0}
    model = VisionTransformer(img_size=(40, 56), init_values=0.1 if scales else None, **sizes)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    given: dict[str, Any] = {"num_heads": 3, "img_size": [40, 56]}
    if not scales:
        assert load_backbone(tmp_path / "x.pth", overrides=given)[1].img_size == (40, 56)
        return
    with pytest.raises(UserError, match=r"\(40, 56\) where the shapes say \(48, 48\)") as error:
        load_backbone(tmp_path / "x.pth", overrides=given)
    assert "options.no_embed_class=false to inspect" in error.value.fix
    told = given | {"options": {"no_embed_class": False}}
    assert load_backbone(tmp_path / "x.pth", overrides=told)[1].img_size == (40, 56)
    assumed = "assumed: as many patches as the position table has rows, a square number"
    check_options(tmp_path / "x.pth", assumed, overrides=given | {"img_size": [48, 48]})
