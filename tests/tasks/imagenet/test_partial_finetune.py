"""Partial fine-tuning: what is trained per number of blocks, the curve, and a resumed run."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from backbones.load import load_backbone
from mae_bench.config import build
from mae_bench.errors import UserError
from mae_bench.job import Outcome
from mae_bench.models.vit import build_vit
from mae_bench.progress import Progress
from tasks.imagenet import partial_finetune
from tasks.imagenet.classify import Classifier
from tasks.imagenet.config import PartialFinetuneConfig
from tests.tasks.imagenet.toy import PLAIN, SPEC, TRAIN, job

VALUES: dict[str, Any] = {
    "kind": "partial_finetune",
    **TRAIN,
    **PLAIN,
    "base_lr": 0.3,
    "epochs": 2,
    "layer_decay": 0.9,
}
BLOCKS: dict[str, Any] = {"blocks": [0, 0.5, 1, 2, 12], "linear": {"base_lr": 200.0, "epochs": 5}}


def partial(data: Path, folder: Path, backbone: str, **changes: Any) -> Outcome:
    config = build(PartialFinetuneConfig, {**VALUES, **BLOCKS, "data": str(data), **changes}, "test")
    return partial_finetune.run(config, job(folder, backbone), Progress())


def test_the_curve(data, tmp_path, backbone):
    outcome = partial(data, tmp_path / "cell", backbone)
    curve = json.loads((tmp_path / "cell/curve.json").read_text())
    assert curve["depth"] == 2
    assert list(curve["top1"]) == ["0", "0.5", "1", "2"], "a number above the depth is left out"
    assert {name: outcome.metrics[f"top1_blocks_{name}"].value for name in curve["top1"]} == curve["top1"]
    assert outcome.metrics["top1"].value == curve["top1"]["1"]
    assert outcome.main_metric == "top1"
    assert all((tmp_path / "cell" / path).is_file() for path in outcome.artefacts.values())


@pytest.mark.parametrize(
    ("count", "trained"),
    [
        (0.5, {"blocks.1.norm2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}),
        (
            1,
            {
                f"blocks.1.{part}"
                for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            },
        ),
    ],
)
def test_what_is_trained(backbone, count, trained):
    vit, spec, _ = load_backbone(backbone, drop_path_rate=0.5)
    model = Classifier(vit, spec, 3, "avg", fc_norm=True)
    model.freeze(count)
    names = {
        name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert names == {f"vit.{part}" for part in trained} | {"fc_norm", "head"}


def test_half_a_block_of_beits_has_its_scale():
    spec = replace(
        SPEC, arch="beit", pos_embed="relative", options={"init_values": 0.1, "use_rel_pos_bias": True}
    )
    model = Classifier(build_vit(spec), spec, 3, "avg", fc_norm=True)
    model.freeze(0.5)
    trained = {name for name, parameter in model.vit.blocks.named_parameters() if parameter.requires_grad}
    assert {"1.gamma_2", "1.mlp.fc1.weight", "1.norm2.weight"} <= trained
    assert "1.gamma_1" not in trained
    assert not any(name.startswith("0.") for name in trained)


def test_frozen_parts_drop_no_paths_and_stay(backbone):
    vit, spec, _ = load_backbone(backbone, drop_path_rate=0.9)
    model = Classifier(vit, spec, 3, "avg", fc_norm=True)
    model.freeze(0.5)
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first, last = model.vit.blocks
    assert not any(part.training for part in (first, last.attn, last.norm1, last.drop_path1))
    assert last.mlp.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    torch.nn.init.normal_(model.head.weight)
    for _ in range(5):  # drop path may leave out the MLP of every image once
        model(torch.randn(8, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert {name for name in changed if name.startswith("vit.")} == {
        f"vit.blocks.1.{part}.{kind}"
        for part, kind in product(("norm2", "mlp.fc1", "mlp.fc2"), ("weight", "bias"))
    }


def test_all_blocks_are_trained_as_such(backbone):
    vit, spec, _ = load_backbone(backbone)
    model = Classifier(vit, spec, 3, "avg", fc_norm=True)
    model.freeze(2)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        "vit.cls_token",
        "vit.pos_embed",
        "vit.patch_embed.proj.weight",
        "vit.patch_embed.proj.bias",
    }


def test_what_is_finished_is_not_trained_again(data, tmp_path, backbone, monkeypatch):
    first = partial(data, tmp_path / "a", backbone)
    calls: list[float] = []
    real = partial_finetune.fine_tune

    def fail_once(config, part, progress, count):
        calls.append(count)
        if calls == [0.5, 1]:
            raise KeyboardInterrupt
        return real(config, part, progress, count)

    monkeypatch.setattr(partial_finetune, "fine_tune", fail_once)
    with pytest.raises(KeyboardInterrupt):
        partial(data, tmp_path / "b", backbone)
    again = partial(data, tmp_path / "b", backbone)
    assert calls == [0.5, 1, 1, 2]
    assert again.metrics == first.metrics
    path = tmp_path / "b/blocks-1/outcome.json"
    path.write_text(path.read_text().replace('"higher"', '"lower"'))
    assert partial(data, tmp_path / "b", backbone).metrics == first.metrics
    assert calls == [0.5, 1, 1, 2, 1], "and what is damaged is"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [1.5]}, "0.5"),
        ({"score": 3}, "not one of blocks"),
        ({"linear": {"momentun": 1}}, "momentun"),
    ],
)
def test_what_cannot_be_tuned_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(PartialFinetuneConfig, {**VALUES, **BLOCKS, "data": "", **change}, "test")


def test_a_probe_of_0_blocks_pools_like_the_others_by_default():
    values = {**VALUES, **BLOCKS, "data": "", "global_pool": "token", "linear": {}}
    assert build(PartialFinetuneConfig, values, "test").build_probe_config().global_pool == "token"
    assert (
        build(PartialFinetuneConfig, {**values, "linear": {"global_pool": "avg"}}, "test")
        .build_probe_config()
        .global_pool
        == "avg"
    )


def test_a_score_beyond_the_depth_is_refused(data, tmp_path, backbone):
    with pytest.raises(UserError, match="backbone of 2 blocks"):
        partial(data, tmp_path / "cell", backbone, score=12)
