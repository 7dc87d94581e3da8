"""The ImageNet protocols on a toy set whose answers are known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbones.adapters.features import get_layer_id
from backbones.load import load_backbone
from mae_bench.config import build
from mae_bench.data.batches.loader import Batch
from mae_bench.data.batches.transforms import normalize
from mae_bench.errors import UserError
from mae_bench.export import write_export
from mae_bench.job import Outcome
from mae_bench.models.vit import build_vit
from mae_bench.progress import Progress
from tasks.context import TaskContext
from tasks.imagenet import finetune, linear_probe, supervised
from tasks.imagenet.classify import Classifier, MixedLoss
from tasks.imagenet.config import FinetuneConfig, LinearProbeConfig, SupervisedConfig
from tasks.imagenet.data import open_data
from tasks.imagenet.evaluate import evaluate
from tests.parity import MEAN, assert_parity, assert_within_rounding
from tests.tasks.imagenet.toy import MODEL, PLAIN, SPEC, TRAIN, job


def probe(data: Path, folder: Path, backbone: str, **changes: object) -> Outcome:
    config = build(
        LinearProbeConfig,
        {"kind": "linear_probe", "data": str(data), **TRAIN, "base_lr": 200.0, "epochs": 30, **changes},
        "test",
    )
    return linear_probe.run(config, job(folder, backbone), Progress())


def test_layer_ids_of_the_reference() -> None:
    names = [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.11.mlp.fc2.bias",
        "fc_norm.weight",
        "head.bias",
    ]
    assert [get_layer_id(name, 12) for name in names] == [0, 0, 0, 1, 12, 13, 13]
    assert pytest.approx(3.70e-3, rel=1e-2) == 0.65 ** (13 - 0), (
        "ViT-B's patch embedding (mae.md, from util/lr_decay.py)"
    )


def test_finetune_trains_everything_and_beats_chance(data: Path, tmp_path: Path, backbone: str) -> None:
    values = {
        "kind": "finetune",
        "data": str(data),
        **TRAIN,
        **PLAIN,
        "base_lr": 0.3,
        "epochs": 8,
        "layer_decay": 0.9,
    }
    outcome = finetune.run(build(FinetuneConfig, values, "test"), job(tmp_path, backbone), Progress())
    assert outcome.metrics["top1"].value > 60
    predictions = np.load(tmp_path / "predictions.npz")
    top1 = 100 * np.mean(predictions["top5"][:, 0] == predictions["targets"])
    assert top1 == pytest.approx(outcome.metrics["top1"].value), "the kept predictions give the score"
    assert sorted(predictions["indices"]) == list(range(9))


def test_finetune_is_reproducible_and_depends_on_the_seed(data: Path, tmp_path: Path, backbone: str) -> None:
    values = {
        "kind": "finetune",
        "data": str(data),
        **TRAIN,
        "base_lr": 0.3,
        "epochs": 2,
        "mixup": 0.8,
        "random_erasing": 0.25,
    }
    config = build(FinetuneConfig, values, "test")
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        losses.append(
            finetune.run(config, job(tmp_path / name, backbone, seed), Progress()).metrics["loss"].value
        )
    assert losses[0] == losses[1] != losses[2]


def test_supervised_exports_what_it_trained(data: Path, tmp_path: Path) -> None:
    values = {
        "kind": "supervised",
        "data": str(data),
        "model": MODEL,
        **TRAIN,
        **PLAIN,
        "base_lr": 0.1,
        "epochs": 8,
        "ema_decay": 0.5,
    }
    outcome = supervised.run(build(SupervisedConfig, values, "test"), job(tmp_path), Progress())
    assert outcome.task == "pretrain"
    vit, spec, report = load_backbone(tmp_path / "export")
    assert report.digest == outcome.backbone_digest
    assert spec.pretrain_method == "supervised"
    assert spec.global_pool == "avg"
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(vit.state_dict()[name], build_vit(spec).state_dict()[name])


def test_evaluation_counts_each_image_once_whatever_the_batch(
    data: Path, tmp_path: Path, backbone: str
) -> None:
    vit, spec, report = load_backbone(backbone)
    torch.manual_seed(0)
    model = Classifier(vit, spec, 3, "avg", fc_norm=False)
    torch.nn.init.normal_(model.head.weight)
    results = []
    for batch_size in (1, 4, 100):
        values = {"kind": "linear_probe", "data": str(data), **TRAIN, "eval_batch_size": batch_size}
        config = build(LinearProbeConfig, values, "test")
        opened = open_data(config)
        context = TaskContext(config, job(tmp_path), Progress(), opened.layout, spec, report)
        results.append(evaluate(context, opened, model))
    assert {count for _, count in results} == {9}
    for metrics, _ in results[1:]:
        assert metrics["top1"] == results[0][0]["top1"]
        loss, expected = (torch.tensor(each["loss"].value) for each in (metrics, results[0][0]))
        assert_within_rounding(loss, expected, roundings=MEAN)


def test_mixed_loss_without_mixing_is_smoothed_cross_entropy(backbone: str) -> None:
    vit, spec, _ = load_backbone(backbone)
    model = Classifier(vit, spec, 3, "token", fc_norm=False)
    torch.nn.init.normal_(model.head.weight)
    values = {"kind": "finetune", "data": "", **TRAIN, **PLAIN, "label_smoothing": 0.1}
    loss = MixedLoss(build(FinetuneConfig, values, "test"), spec, 3, torch.device("cpu"))
    imgs, targets = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    log = F.log_softmax(model(normalize(imgs, spec.mean, spec.std)), dim=1)
    want = -(0.9 * log[range(4), targets] + 0.1 * log.mean(dim=1)).mean()
    assert_within_rounding(loss(model, Batch(imgs, targets, targets), 0), want, roundings=MEAN)


def test_fine_tuning_layout_replaces_the_final_norm(backbone: str) -> None:
    """global_pool=avg: mean of the patch tokens without the backbone's norm, then fc_norm.

    Source: facebookresearch/mae, models_vit.py.
    """
    loaded, spec, _ = load_backbone(backbone)
    vit: Any = loaded.double()
    imgs = torch.randn(2, 3, 16, 16).double()
    tokens = vit.blocks(vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(imgs)))))
    model = Classifier(vit, spec, 3, "avg", fc_norm=True).double()
    assert_parity(model.forward_features(imgs), model.fc_norm(tokens[:, 1:].mean(dim=1)))


def test_size_that_the_patch_does_not_divide_is_refused(data: Path, tmp_path: Path, backbone: str) -> None:
    with pytest.raises(UserError, match="patch"):
        probe(data, tmp_path, backbone, img_size=(20, 20))


def test_larger_images_resample_the_position_table(data: Path, tmp_path: Path, backbone: str) -> None:
    outcome = probe(data, tmp_path, backbone, img_size=(32, 32))
    assert outcome.metrics["top1"].value == 100
    assert outcome.cost["gmacs"] > 3 * probe(data, tmp_path / "small", backbone).cost["gmacs"]


def test_backbone_without_class_token(data: Path, tmp_path: Path) -> None:
    spec = replace(SPEC, num_prefix_tokens=0, pos_embed="learned")
    write_export(tmp_path / "export", build_vit(spec, global_pool="avg").state_dict(), spec, {})
    with pytest.raises(Exception, match="global_pool"):
        probe(data, tmp_path / "run", str(tmp_path / "export"), global_pool="token")


def test_odd_batches_cannot_be_mixed() -> None:
    values = {"kind": "finetune", "data": "", **TRAIN, "global_batch_size": 9}
    with pytest.raises(UserError, match="odd"):
        build(FinetuneConfig, values, "test")
    build(FinetuneConfig, {**values, "mixup": 0.0, "cutmix": 0.0}, "test")
