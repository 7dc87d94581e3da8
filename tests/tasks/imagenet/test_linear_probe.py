"""The linear probe: LARS, the frozen backbone, a grid that equals its heads, the choice of a head."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lars as TimmLars

from backbones.load import load_backbone
from mae_bench.config import build
from mae_bench.errors import UserError
from mae_bench.job import Outcome
from mae_bench.progress import Progress
from tasks.imagenet import linear_probe
from tasks.imagenet.config import LinearProbeConfig
from tasks.imagenet.features import FeatureSet, FrozenFeatures
from tasks.imagenet.lars import MAX_NORM, Lars
from tests.parity import MEAN, assert_parity, assert_within_rounding
from tests.tasks.imagenet.toy import TRAIN, job

GRID: dict[str, Any] = {
    "lrs": [1.0, 50.0, 200.0],
    "pools": ["token", "avg"],
    "layers": [1, 2],
    "holdout": 0.25,
}


def probe(data: Path, folder: Path, backbone: str, **changes: Any) -> Outcome:
    values = {"kind": "linear_probe", "data": str(data), **TRAIN, "base_lr": 200.0, "epochs": 30, **changes}
    return linear_probe.run(build(LinearProbeConfig, values, "test"), job(folder, backbone), Progress())


@pytest.mark.parametrize("features", ["augmented", "cached"])
@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_separable_features_reach_100(data, tmp_path, backbone, global_pool, features):
    outcome = probe(data, tmp_path / "run", backbone, global_pool=global_pool, features=features)
    assert outcome.metrics["top1"].value == 100
    assert outcome.num_samples == 9
    assert outcome.backbone_digest == load_backbone(backbone)[2].digest


@pytest.mark.parametrize("features", ["augmented", "cached"])
def test_a_grid_equals_its_heads_one_by_one(data, tmp_path, backbone, monkeypatch, features):
    trained: dict[str, list[torch.Tensor]] = {}
    real = linear_probe.choose_head

    def keep(context, probe, heads, *rest):
        for head, linear in zip(heads, probe.heads, strict=True):
            trained.setdefault(head.name, []).append(linear.weight.detach().clone())
        return real(context, probe, heads, *rest)

    monkeypatch.setattr(linear_probe, "choose_head", keep)
    common = {"epochs": 3, "features": features}
    probe(data, tmp_path / "grid", backbone, **GRID, **common)
    for lr in GRID["lrs"]:
        for pool in GRID["pools"]:
            for layers in GRID["layers"]:
                single = {**GRID, "lrs": [lr], "pools": [pool], "layers": [layers]}
                probe(data, tmp_path / f"{lr}-{pool}-{layers}", backbone, **single, **common)
    assert len(trained) == 12
    for name, weights in trained.items():
        assert len(weights) == 2, name
        # a product of another shape rounds otherwise, and each of nine steps with lr 200 enlarges that
        assert_within_rounding(weights[0], weights[1], roundings=1000, msg=name)


def test_the_head_is_chosen_on_images_held_out_of_train(data, tmp_path, backbone):
    outcome = probe(data, tmp_path / "run", backbone, **{**GRID, "lrs": [1e-6, 200.0]})
    saved = json.loads((tmp_path / "run/heads.json").read_text())
    assert saved["held_out_images"] == 6
    best = max(saved["heads"], key=lambda entry: (entry["top1"], -entry["loss"]))
    assert saved["chosen"] == best["head"]
    assert "base_lr 200" in saved["chosen"], "a head that hardly learns is not chosen"
    assert any(saved["chosen"] in note and "6 images held out of train" in note for note in outcome.notes)
    assert outcome.artefacts["heads"] == "heads.json"


def test_choosing_on_val_is_refused():
    values = {"kind": "linear_probe", "data": "", **TRAIN, "lrs": [0.1, 1.0]}
    with pytest.raises(UserError, match="a share of train to choose on"):
        build(LinearProbeConfig, values, "test")
    with pytest.raises(UserError, match="chosen only at the end"):
        build(LinearProbeConfig, {**values, "holdout": 0.1, "eval_epochs": 1}, "test")


def test_a_norm_over_all_heads_is_refused():
    values = {
        "kind": "linear_probe",
        "data": "",
        **TRAIN,
        "lrs": [1.0, 2.0],
        "holdout": 0.1,
        "clip_grad": 1.0,
    }
    with pytest.raises(UserError, match="clip_grad with 2 heads"):
        build(LinearProbeConfig, values, "test")


def test_the_backbone_stays_as_it_was(backbone):
    vit, spec, _ = load_backbone(backbone, drop_path_rate=0.5)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    config = build(LinearProbeConfig, {"kind": "linear_probe", "data": "", **TRAIN}, "test")
    heads = linear_probe.build_heads(config, spec)
    extract = FrozenFeatures(vit, spec, [heads[0].features])
    model = linear_probe.Probe(heads, [heads[0].features], extract.widths, 3, 0).attach(extract)
    optimizer = linear_probe.build_lars(model, config, heads)
    model.train()
    linear_probe.sum_losses(model(torch.randn(6, 3, 16, 16)), torch.arange(6) % 3).backward()
    optimizer.step()
    assert {name for name, _ in model.named_parameters()} == {"heads.0.weight", "heads.0.bias"}
    assert not vit.training, "no drop path under a frozen backbone"
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_features_of_the_last_layers(backbone):
    """They equal the normed tokens of the last two blocks, concatenated, from plain calls of the model."""
    vit, spec, _ = load_backbone(backbone)
    vit, imgs = vit.double(), torch.randn(2, 3, 16, 16).double()
    sets = [FeatureSet("token"), FeatureSet("avg"), FeatureSet("avg", 2)]
    found = FrozenFeatures(vit, spec, sets)(imgs)
    model: Any = vit.eval()
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(imgs))
        first = model.blocks[0](x)
        tokens = [model.norm(first), model.norm(model.blocks[1](first))]
        expected = [
            tokens[1][:, 0],
            tokens[1][:, 1:].mean(1),
            tokens[0][:, 1:].mean(1),
            tokens[1][:, 1:].mean(1),
        ]
    assert_parity(found, torch.cat(expected, dim=1))
    with pytest.raises(UserError, match="depth 2"):
        FrozenFeatures(vit, spec, [FeatureSet("avg", 3)])


def steps_of(optimizer: torch.optim.Optimizer, model: torch.nn.Linear, count: int = 3) -> None:
    for step in range(count):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_lars_equals_the_reference_rule():
    """Two steps of facebookresearch/mae's util/lars.py: trust 0.001, momentum 0.9, biases without trust."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    weight, bias = (p.detach().clone() for p in (model.weight, model.bias))
    optimizer = Lars([{"params": list(model.parameters())}], lr=2.0, momentum=0.9, weight_decay=0.1)
    momentum_weight = momentum_bias = torch.zeros(())
    for step in range(2):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert model.weight.grad is not None
        assert model.bias.grad is not None
        update = model.weight.grad + 0.1 * weight
        momentum_weight = 0.9 * momentum_weight + 0.001 * weight.norm() / update.norm() * update
        momentum_bias = 0.9 * momentum_bias + model.bias.grad
        optimizer.step()
        weight, bias = weight - 2.0 * momentum_weight, bias - 2.0 * momentum_bias
    assert_parity(model.weight, weight)
    assert_parity(model.bias, bias)


def test_lars_equals_timms():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(4, 3, bias=False).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    steps_of(Lars([{"params": [ours.weight]}], lr=3.0, momentum=0.9, weight_decay=0.0), ours)
    steps_of(
        TimmLars([{"params": [theirs.weight], "always_adapt": True}], lr=3.0, momentum=0.9, weight_decay=0.0),
        theirs,
    )
    assert_parity(ours.weight, theirs.weight)


def test_a_head_that_diverges_stays_finite_and_does_not_stop_the_others(data, tmp_path, backbone):
    outcome = probe(data, tmp_path / "run", backbone, lrs=[200.0, 1e6], holdout=0.25, epochs=30)
    assert outcome.metrics["top1"].value == 100
    model = torch.nn.Linear(4, 3).double()
    steps_of(Lars([{"params": list(model.parameters())}], lr=1e5, momentum=0.9, weight_decay=0.0), model, 300)
    assert model.weight.isfinite().all()
    assert model.weight.norm() < MAX_NORM**3


def test_loss_of_several_heads_is_the_sum_of_their_means():
    logits, targets = torch.randn(5, 2, 3), torch.tensor([0, 1, 2, 0, 1])
    expected = F.cross_entropy(logits[:, 0], targets) + F.cross_entropy(logits[:, 1], targets)
    assert_within_rounding(linear_probe.sum_losses(logits, targets), expected, roundings=MEAN)


def test_images_held_out_are_the_same_for_every_seed(data, tmp_path, backbone, monkeypatch):
    seen = []
    real = linear_probe.train_heads

    def keep(*args):
        seen.append(args[-1])
        return real(*args)

    monkeypatch.setattr(linear_probe, "train_heads", keep)
    for seed in (0, 1):
        values = {"kind": "linear_probe", "data": str(data), **TRAIN, "epochs": 1, "holdout": 0.25}
        linear_probe.run(
            build(LinearProbeConfig, values, "test"), job(tmp_path / str(seed), backbone, seed), Progress()
        )
    assert np.array_equal(seen[0], seen[1])
    assert len(seen[0]) == 18
