"""Every wrapper and prefix is found, several sets are asked for, and odd contents end in a reason."""

from collections import OrderedDict
from typing import Any

import pytest
import torch

from backbones.reading.unwrap import ANCHORS, SeveralSets, unwrap
from mae_bench.errors import UserError

VIT = {
    "cls_token": torch.zeros(1, 1, 4),
    "patch_embed.proj.weight": torch.zeros(4, 3, 2, 2),
    "blocks.0.norm1.bias": torch.ones(4),
}


def under(prefix: str, tensors: dict[str, torch.Tensor] = VIT) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


HEAD = {"head.weight": torch.zeros(10, 4)}
ONE_SET: dict[str, tuple[Any, str, str]] = {  # what a file holds, wrapper, prefix
    "bare": (VIT, "", ""),
    "an ordered dictionary": (OrderedDict(VIT), "", ""),
    "model": ({"model": VIT, "epoch": 3}, "model", ""),
    "state_dict": ({"state_dict": VIT, "arch": "vit"}, "state_dict", ""),
    "DistributedDataParallel": ({"model": under("module.")}, "model", "module."),
    "DINO's teacher alone": ({"teacher": under("backbone.") | HEAD}, "teacher", "backbone."),
    "MoCo's": ({"state_dict": under("module.base_encoder.")}, "state_dict", "module.base_encoder."),
    "Lightning": (
        {"state_dict": under("model.backbone.") | HEAD, "callbacks": {}},
        "state_dict",
        "model.backbone.",
    ),
    "mmengine": (
        {"meta": {"epoch": 1}, "state_dict": under("backbone."), "message_hub": {}},
        "state_dict",
        "backbone.",
    ),
    "an encoder": (under("encoder.") | {"decoder.0.weight": torch.zeros(1)}, "", "encoder."),
    "torch.compile": (under("_orig_mod."), "", ""),
    "compiled and distributed": ({"model": under("module._orig_mod.")}, "model", "module."),
    "FSDP": (
        {
            "_fsdp_wrapped_module." + k.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t
            for k, t in VIT.items()
        },
        "",
        "",
    ),
    "checkpointed blocks": (
        {k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): t for k, t in VIT.items()},
        "",
        "",
    ),
    "three deep": ({"a": {"b": {"c": VIT}}}, "a.b.c", ""),
    "one dictionary by two names": ({"model": VIT, "state_dict": VIT}, "model", ""),
}


@pytest.mark.parametrize("name", ONE_SET)
def test_one_set_is_found_where_it_lies(name):
    content, wrapper, prefix = ONE_SET[name]
    part = unwrap(content, "x.pth")
    assert (part.wrapper, part.prefix) == (wrapper, prefix)
    assert part.tensors == VIT
    assert not set(part.outside) & set(under(prefix))
    assert unwrap(content, "x.pth", part.label).tensors == VIT


@pytest.mark.parametrize("anchor", ANCHORS)
def test_every_layouts_patch_embedding_is_an_anchor(anchor):
    tensors = {anchor: torch.zeros(4, 3, 2, 2), "class_embedding": torch.zeros(4)}
    part = unwrap({"state_dict": under("visual.", tensors) | {"text.weight": torch.zeros(1)}}, "x.pth")
    assert (part.prefix, set(part.tensors), set(part.outside)) == ("visual.", set(tensors), {"text.weight"})


def test_what_else_stands_in_the_file_is_kept():
    part = unwrap(
        {
            "model": VIT | {"note": "mine"},
            "epoch": 3,
            "optimizer": {"state": {0: torch.zeros(1)}},
            7: "seven",
        },
        "x.pth",
    )
    assert part.extras == {
        "note": "mine",
        "epoch": 3,
        "optimizer": {"state": {0: torch.zeros(1)}},
        "7": "seven",
    }


SEVERAL: dict[
    str, tuple[dict[str, Any], dict[str, str], str]
] = {  # what a file holds, what is asked for -> wrapper and prefix, advice
    "DINO, iBOT": (
        {"student": under("module.backbone."), "teacher": under("backbone.")},
        {
            "student": "student|module.backbone.",
            "teacher": "teacher|backbone.",
            "teacher.backbone": "teacher|backbone.",
        },
        "--weights teacher",
    ),
    "DINOv2": (
        {"model": under("student.backbone.") | under("teacher.backbone.")},
        {"teacher": "model|teacher.backbone.", "model.student.backbone": "model|student.backbone."},
        "--weights teacher",
    ),
    "MoCo v3": (
        {"state_dict": under("module.base_encoder.") | under("module.momentum_encoder.")},
        {
            "base_encoder": "state_dict|module.base_encoder.",
            "momentum_encoder": "state_dict|module.momentum_encoder.",
        },
        "--weights base_encoder",
    ),
    "I-JEPA": (
        {"encoder": under("module."), "predictor": HEAD, "target_encoder": under("module.")},
        {"encoder": "encoder|module.", "target_encoder": "target_encoder|module."},
        "--weights target_encoder",
    ),
    "timm's EMA": (
        {"state_dict": VIT, "state_dict_ema": under("module.")},
        {"state_dict": "state_dict|", "state_dict_ema": "state_dict_ema|module."},
        "--weights state_dict_ema",
    ),
    "DeiT's EMA": (
        {"model": VIT, "model_ema": dict(VIT)},
        {"model": "model|", "model_ema": "model_ema|"},
        "--weights model_ema",
    ),
    "mmengine's EMA": (
        {
            "state_dict": under("backbone."),
            "ema_state_dict": under("module.backbone.") | {"steps": torch.tensor(3)},
        },
        {"state_dict": "state_dict|backbone.", "ema_state_dict": "ema_state_dict|module.backbone."},
        "--weights ema_state_dict",
    ),
    "one around another": (
        VIT | under("momentum."),
        {"": "|", "momentum": "|momentum."},
        "--weights momentum",
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_sets_are_asked_for(name):
    content, choices, advice = SEVERAL[name]
    with pytest.raises(SeveralSets, match="2 sets of ViT weights") as error:
        unwrap(content, "x.pth")
    assert advice in str(error.value)
    assert len(error.value.labels) == 2
    for choice, place in choices.items():
        part = unwrap(content, "x.pth", choice)
        assert f"{part.wrapper}|{part.prefix}" == place
        assert part.tensors == VIT
    with pytest.raises(
        SeveralSets, match="'teecher' selects none of them(?s:.*)give `weights:` for each in a YAML list"
    ):
        unwrap(content, "x.pth", "teecher")


def test_the_set_that_the_authors_evaluate_is_named():
    with pytest.raises(SeveralSets, match="teacher is what the authors of dino, ibot.* evaluate"):
        unwrap(SEVERAL["DINO, iBOT"][0], "x.pth")
    with pytest.raises(SeveralSets, match="base_encoder is what the authors of moco_v3 evaluate"):
        unwrap(SEVERAL["MoCo v3"][0], "x.pth")
    with pytest.raises(SeveralSets) as error:
        unwrap(SEVERAL["timm's EMA"][0], "x.pth")
    assert "authors" not in str(error.value)


def test_one_set_that_is_not_the_one_asked_for():
    with pytest.raises(
        UserError, match="x.pth holds one set of ViT weights, named teacher, not 'student'"
    ) as error:
        unwrap({"teacher": VIT}, "x.pth", "student")
    assert "leave out --weights" in error.value.fix
    with pytest.raises(UserError, match=r'named "" \(the top level\), not'):
        unwrap(VIT, "x.pth", "student")


def test_a_file_without_a_vit_gives_its_largest_dictionary():
    part = unwrap(
        {
            "small": {"a": torch.zeros(1)},
            "model": {"layer1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)},
        },
        "x.pth",
    )
    assert (part.wrapper, set(part.tensors)) == ("model", {"layer1.weight", "fc.bias"})


def deep(levels: int) -> dict[str, Any]:
    content: dict[str, Any] = dict(VIT)
    for _ in range(levels):
        content = {"model": content}
    return content


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "nothing"),
        ([VIT], "holds list"),
        (torch.zeros(3), "holds Tensor"),
        (None, "holds NoneType"),
        ({1: torch.zeros(1), None: {}, (2, "x"): 3}, "named tensors"),
        ({"x" * 10**6: 1}, "holds"),
        (deep(20_000), "holds"),
        ({"a.weight": torch.zeros(1), "_orig_mod.a.weight": torch.ones(1), **VIT}, "twice"),
        ({f"{i}.{name}": tensor for i in range(3000) for name, tensor in VIT.items()}, "3000 sets"),
    ],
)
def test_odd_contents_are_refused(content, told):
    with pytest.raises(UserError, match=told) as error:
        unwrap(content, "x.pth")
    assert len(str(error.value)) < 1000


def test_a_thousand_ways_into_each_level():
    content: dict[str, Any] = {"model": dict(VIT)}
    content |= {f"again{i}": content for i in range(1000)}
    part = unwrap(content, "x.pth")
    assert (part.wrapper, set(part.tensors)) == ("model", set(VIT))
