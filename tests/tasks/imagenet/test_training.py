"""Images, targets, learning rates and weights in fine-tuning, against timm or computed by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

from backbones.load import load_backbone
from mae_bench.config import build
from mae_bench.data.batches.loader import Batch
from mae_bench.data.batches.transforms import normalize
from mae_bench.data.seeds import seed_everything
from mae_bench.engine.ema import Ema
from mae_bench.errors import UserError
from mae_bench.models.vit import build_vit
from mae_bench.progress import Progress
from tasks.imagenet import finetune
from tasks.imagenet.classify import Classifier, MixedLoss
from tasks.imagenet.config import FinetuneConfig, SupervisedConfig
from tests.parity import MEAN, assert_parity, assert_within_rounding
from tests.tasks.imagenet.toy import MODEL, PLAIN, PROTOCOLS, SPEC, TRAIN, job, run_protocol

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.3, 0.2, 0.1], [-1.0, 0.0, 3.0]])
TARGETS = torch.tensor([0, 1, 2, 2])


class Seen(torch.nn.Module):
    """Keep the input and return LOGITS."""

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        self.imgs = imgs
        return LOGITS


def loss_of(imgs: torch.Tensor, seed: int = 3, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a training batch, and the input that the model saw."""
    config = build(FinetuneConfig, {"kind": "finetune", "data": "", **TRAIN, **PLAIN, **changes}, "test")
    seed_everything(seed)
    model = Seen()
    return MixedLoss(config, SPEC, 3, torch.device("cpu"))(
        model, Batch(imgs, TARGETS, TARGETS), 0
    ), model.imgs


def noise(size: int = 16) -> torch.Tensor:
    return torch.randint(
        0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def mixed_loss(lam: float, smoothing: float) -> torch.Tensor:
    """Return the cross-entropy with lam x the smoothed targets + (1 - lam) x those of the reversed batch."""
    hard = F.one_hot(TARGETS, 3) * (1 - smoothing) + smoothing / 3
    soft = lam * hard + (1 - lam) * hard.flip(0)
    return -(soft * LOGITS.log_softmax(dim=1)).sum(dim=1).mean()


@pytest.fixture
def built(
    data: Path, tmp_path: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Classifier, torch.optim.Optimizer]:
    """Return the model and the optimizer that fine-tuning builds."""
    made: list[Any] = []

    def keep(context, data, model, make_optimizer):
        made.extend([model, make_optimizer(model)])
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train_classifier", keep)
    values = {"kind": "finetune", "data": str(data), **TRAIN, "layer_decay": 0.65, "drop_path": 0.3}
    with pytest.raises(KeyboardInterrupt):
        finetune.run(build(FinetuneConfig, values, "test"), job(tmp_path / "cell", backbone), Progress())
    return made[0], made[1]


def test_layer_decay_equals_timms(built: tuple[Classifier, torch.optim.Optimizer]) -> None:
    """Except for the final norm: timm counts it to the last block, MAE's util/lr_decay.py to the head."""
    model, optimizer = built
    theirs = build_vit(SPEC, num_classes=3)
    groups = param_groups_layer_decay(
        theirs, weight_decay=0.05, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.65
    )
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    expected: dict[str, tuple[float, float]] = {}
    for group in groups:
        values = group["lr_scale"], group["weight_decay"]
        expected |= {names[id(parameter)]: values for parameter in group["params"]}
    expected = {name: values for name, values in expected.items() if not name.startswith("norm.")}
    ours = {id(parameter): name.removeprefix("vit.") for name, parameter in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        values = group["lr_scale"], group["weight_decay"]
        found |= {ours[id(parameter)]: values for parameter in group["params"]}
    assert found.keys() == set(ours.values()), "every weight is trained"
    assert (found.pop("fc_norm.weight"), found.pop("fc_norm.bias")) == ((1.0, 0.0), (1.0, 0.0))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == pytest.approx(expected[name]), name
    assert found["pos_embed"] == pytest.approx((0.65**3, 0.0)), (
        "of two blocks, position table and stem are the third layer down"
    )


def test_drop_path_grows_with_depth(built: tuple[Classifier, torch.optim.Optimizer]) -> None:
    model, _ = built
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.vit.blocks]
    assert rates == pytest.approx([0.0, 0.3])
    imgs = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.eval()
    assert torch.equal(model.forward_features(imgs), model.forward_features(imgs)), (
        "no path is dropped in evaluation"
    )
    model.train()
    assert not torch.equal(model.forward_features(imgs), model.forward_features(imgs))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_by_hand(smoothing: float) -> None:
    imgs = noise()
    loss, seen = loss_of(imgs, mixup=0.8, label_smoothing=smoothing)
    seed_everything(3)
    np.random.rand()  # whether to mix at all
    lam = np.random.beta(0.8, 0.8)
    plain = normalize(imgs, SPEC.mean, SPEC.std)
    assert_within_rounding(
        seen, lam * plain + (1 - lam) * plain.flip(0), roundings=16
    )  # mixed as bytes, then normalised
    assert_within_rounding(loss, mixed_loss(lam, smoothing), roundings=MEAN)


def test_cutmix_mixes_targets_by_area() -> None:
    imgs = noise()
    plain = normalize(imgs, SPEC.mean, SPEC.std)
    shares = []
    for seed in range(6):
        loss, seen = loss_of(imgs, seed, cutmix=1.0, label_smoothing=0.1)
        other = (seen != plain).any(dim=1)  # (4, 16, 16): the same rectangle in each image
        if not other.any():  # the rectangle may lie outside
            assert_within_rounding(loss, mixed_loss(1.0, 0.1), roundings=MEAN)
            continue
        rows, columns = other.any(dim=(0, 2)).nonzero(), other.any(dim=(0, 1)).nonzero()
        box = (..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        assert torch.equal(seen[box], plain.flip(0)[box])
        shares.append(seen[box][0, 0].numel() / 256)
        assert_within_rounding(loss, mixed_loss(1 - shares[-1], 0.1), roundings=MEAN)
    assert len(set(shares)) > 1


def test_random_erasing_puts_noise_into_normalised_images() -> None:
    """Erased pixels are normal noise around 0; black is not 0 after normalisation."""
    imgs = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    _, seen = loss_of(imgs, random_erasing=1.0)
    plain = normalize(imgs, SPEC.mean, SPEC.std)
    erased = seen[seen != plain]
    assert 0.02 <= erased.numel() / seen.numel() <= 1 / 3
    assert abs(erased.mean()) < 0.1
    assert erased.std() == pytest.approx(1, abs=0.1)
    assert torch.equal(loss_of(imgs)[1], plain)


def test_the_average_of_weights_by_hand(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average starts at the first step's weights, with decay 0.5; it is what is exported and scored."""
    name, seen = "vit.blocks.0.attn.qkv.weight", []
    real = Ema.update

    def update(self: Ema, model: torch.nn.Module, step: int) -> None:
        seen.append(model.state_dict()[name].clone())
        real(self, model, step)

    monkeypatch.setattr(Ema, "update", update)
    run_protocol("supervised", data, tmp_path, "", ema_decay=0.5)
    average = seen[0]
    for weight in seen[1:]:
        average = 0.5 * average + 0.5 * weight
    exported = load_backbone(tmp_path / "export")[0].state_dict()[name.removeprefix("vit.")]
    assert len(seen) == 2 * 3
    assert_within_rounding(exported, average, roundings=2 * len(seen))  # two products a step
    assert not torch.equal(exported, seen[-1])


def test_the_class_token_is_read_after_the_backbones_norm(backbone: str) -> None:
    loaded, spec, _ = load_backbone(backbone)
    vit: Any = loaded.double()
    imgs = torch.randn(2, 3, 16, 16).double()
    tokens = vit.norm(vit.blocks(vit._pos_embed(vit.patch_embed(imgs))))
    model = Classifier(vit, spec, 3, "token", fc_norm=False)
    assert_parity(model.forward_features(imgs), tokens[:, 0])
    assert not any(name.startswith("fc_norm") for name, _ in model.named_parameters())


def test_a_model_from_scratch_has_one_size() -> None:
    values = PROTOCOLS["supervised"] | {"data": "", "model": MODEL}
    build(SupervisedConfig, values | {"img_size": (16, 16)}, "test")
    with pytest.raises(UserError, match=r"img_size \(32, 32\) with model.img_size \(16, 16\)"):
        build(SupervisedConfig, values | {"img_size": (32, 32)}, "test")
