"""Linear probing: one or many linear classifiers on frozen features, in one pass (arXiv 2111.06377, Table 10)."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mae_bench.data.batches.loader import Batch, TrainingOrder
from mae_bench.data.batches.transforms import normalize
from mae_bench.data.seeds import derive_seed
from mae_bench.data.sets.subset import Subset, sample_per_class
from mae_bench.engine.distributed import sum_over_ranks, world
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.job import Job, Outcome
from mae_bench.models.cost import num_params
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.imagenet.classify import BatchStream, load_at_size, logits_of, stream
from tasks.imagenet.config import LinearProbeConfig
from tasks.imagenet.data import Data, open_data
from tasks.imagenet.evaluate import (
    PREDICTIONS_FILE,
    Feed,
    Inputs,
    outcome_of,
    predict,
    share_bad,
    trained_outcome,
    watch_epochs,
)
from tasks.imagenet.features import FeatureSet, FrozenFeatures, SplitFeatures, cached_features, feature_set
from tasks.imagenet.lars import MOST, Lars

HEAD_STD = 0.01
BATCH_NORM_EPS = 1e-6
HEADS_FILE = "heads.json"


@dataclass(frozen=True)
class Head:
    """One of the classifiers that are trained side by side."""

    base_lr: float
    features: FeatureSet

    @property
    def name(self) -> str:
        return f"{self.features.name}, base_lr {self.base_lr:g}"


def heads_of(config: LinearProbeConfig, spec: BackboneSpec) -> list[Head]:
    """The grid, in the order lrs x pools x layers."""
    pools = config.pools or [feature_set(config, spec).pool]
    grid = product(config.lrs or [config.base_lr], pools, config.layers)
    return [Head(lr, FeatureSet(pool, layers)) for lr, pool, layers in grid]


class Probe(nn.Module):
    """Heads on frozen features: BatchNorm without affine parameters, one for each set of features, then linear layers.

    N images, H heads, K classes. extract: what makes the features; None where they come as inputs. Its parameters are the heads'
    alone, drawn from the seed and the width, so that a head is the same whatever stands beside it.
    """

    def __init__(
        self, heads: list[Head], sets: list[FeatureSet], widths: list[int], num_classes: int, seed: int
    ):
        super().__init__()
        self._extract: list[
            FrozenFeatures
        ] = []  # in a list: no part of the module, so no train() and no state
        self._widths = widths
        self._places = [sets.index(head.features) for head in heads]
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS) for width in widths
        )
        self.heads = nn.ModuleList(_linear(widths[place], num_classes, seed) for place in self._places)

    def on(self, extract: FrozenFeatures) -> "Probe":
        """The probe on images instead of features."""
        self._extract = [extract]
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W), or features (N, all sets' widths), -> logits (N, H, K)."""
        features = self._extract[0](inputs) if self._extract else inputs
        return logits_of(self._logits, features, self.training)

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        parts = [
            norm(part) for norm, part in zip(self.norms, features.split(self._widths, dim=1), strict=True)
        ]
        return torch.stack(
            [head(parts[place]) for head, place in zip(self.heads, self._places, strict=True)], dim=1
        )

    def diverged(self) -> list[int]:
        """The heads that Lars let stand still."""
        return [
            place for place, head in enumerate(self.heads) if not head.get_parameter("weight").norm() < MOST
        ]


def _linear(width: int, num_classes: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    with torch.no_grad():
        nn.init.trunc_normal_(
            head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(derive_seed(seed, 0, -5))
        )
        head.bias.zero_()
    return head


class ImageInputs:
    """Images for the probe: cropped at random and flipped in training, from the middle in evaluation."""

    def __init__(self, config: LinearProbeConfig, data: Data, spec: BackboneSpec, device: torch.device):
        self.config, self.data, self.spec, self.device = config, data, spec, device
        self.feed = Feed(config, spec, device)

    def training(self, rows: np.ndarray, order: TrainingOrder) -> BatchStream:
        return stream(Subset(self.data.train, rows), self.config, order, self.spec, auto_augment=None)

    def prepare(self, batch: Batch) -> torch.Tensor:
        """The model's input of a training batch."""
        return normalize(batch.imgs.to(self.device, non_blocking=True), self.spec.mean, self.spec.std)

    def held_out(self, rows: np.ndarray) -> Iterator[Inputs]:
        return self.feed.batches(Subset(self.data.train, rows), self.data.bad_train)

    def val(self) -> Iterator[Inputs]:
        return self.feed.batches(self.data.val, self.data.bad_val)


class FeatureInputs:
    """Cached features for the probe: the same in every epoch."""

    def __init__(
        self,
        config: LinearProbeConfig,
        features: dict[str, SplitFeatures],
        spec: BackboneSpec,
        device: torch.device,
    ):
        self.config, self.features, self.device = config, features, device
        self.feed = Feed(config, spec, device)

    def training(self, rows: np.ndarray, order: TrainingOrder) -> BatchStream:
        train = self.features["train"]

        def batches(start: int, stop: int) -> Iterator[Batch]:
            for items in order.batches(start, stop):
                chosen = rows[[index for _, index, _ in items]]
                yield Batch(
                    *train.whole(chosen, torch.device("cpu")), torch.from_numpy(chosen), start=items[0][2]
                )

        return batches

    def prepare(self, batch: Batch) -> torch.Tensor:
        return batch.imgs.to(self.device, non_blocking=True)

    def held_out(self, rows: np.ndarray) -> Iterator[Inputs]:
        return self._share("train", rows)

    def val(self) -> Iterator[Inputs]:
        return self._share("val", self.features["val"].rows())

    def _share(self, split: str, rows: np.ndarray) -> Iterator[Inputs]:
        mine, size = rows[world().rank :: world().size], self.config.eval_batch_size
        for begin, (values, targets) in enumerate(self.features[split].chunks(mine, size, self.device)):
            yield torch.from_numpy(mine[begin * size : (begin + 1) * size]), targets.cpu(), values


def run(config: LinearProbeConfig, job: Job, progress: Progress) -> Outcome:
    """Trains the heads by LARS, chooses one on the images held out of train, scores it on val. Main metric top1, last epoch."""
    data = open_data(config)
    device = torch.device(job.device)
    vit, spec, report = load_at_size(config, job.backbone)
    heads = heads_of(config, spec)
    sets = list(dict.fromkeys(head.features for head in heads))
    extract = FrozenFeatures(vit, spec, sets).to(device)
    probe = Probe(heads, sets, extract.widths, data.num_classes, job.seed).to(device)
    inputs: ImageInputs | FeatureInputs
    cost: dict[str, float] = {}
    if config.features == "cached":
        began = time.monotonic()
        features = cached_features(extract, data, config, spec, device, progress)
        cost["seconds_features"] = time.monotonic() - began
        inputs, usable = FeatureInputs(config, features, spec, device), features["train"].rows()
    else:
        inputs, usable = ImageInputs(config, data, spec, device), np.arange(len(data.train))
        probe.on(extract)
    held_out = (
        usable[sample_per_class(data.train.targets[usable], config.holdout, seed=0)]
        if config.holdout
        else usable[:0]
    )
    rows = np.setdiff1d(usable, held_out)
    trainer = train_heads(config, job, progress, data, probe, heads, inputs, rows)
    trained = trainer.full_model().eval()
    began = time.monotonic()
    place, told = choose(trained, heads, inputs, held_out, job, progress)
    found = predict(_one_head(inputs, trained, place), inputs.val(), len(data.val), progress)
    share_bad(data.bad_val)
    if world().is_main:
        found.save(job.dir / PREDICTIONS_FILE)
    seconds, notes = time.monotonic() - began, [*told, *data.notes]
    metrics, count, params = (
        found.metrics(),
        len(found.targets),
        num_params(vit) + num_params(probe.heads[place]),
    )
    outcome = outcome_of(metrics, count, data.report, config, spec, report, job, seconds, params, notes=notes)
    outcome = replace(outcome, artefacts=outcome.artefacts | {"heads": HEADS_FILE}, cost=outcome.cost | cost)
    return trained_outcome(outcome, trainer, job)


def train_heads(
    config: LinearProbeConfig,
    job: Job,
    progress: Progress,
    data: Data,
    probe: Probe,
    heads: list[Head],
    inputs: ImageInputs | FeatureInputs,
    rows: np.ndarray,
) -> Trainer:
    """Trains all heads on the training images `rows`; every loss is its head's own, so their sum trains each as if alone."""
    order = TrainingOrder(len(rows), config.global_batch_size, job.seed, world().rank, world().size)
    optimizer = partial(lars, config=config, heads=heads)
    trainer = Trainer(job, config, probe, optimizer, order.steps_per_epoch, progress, data.bad_train)
    if min(trainer.accumulation.sizes) == 1:
        raise UserError(
            f"{trainer.accumulation}: a single image in front of a BatchNorm",
            expected="two or more, which have a variance",
            fix="another device_batch_size, or a larger global_batch_size",
        )

    def metrics_of(model: nn.Module) -> dict[str, Metric]:
        return predict(_one_head(inputs, model.eval(), 0), inputs.val(), len(data.val), progress).metrics()

    def loss_of(model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        return sum_of_losses(model(inputs.prepare(batch)), batch.targets.to(inputs.device, non_blocking=True))

    watch_epochs(trainer, config.eval_epochs, metrics_of, job, progress)
    trainer.fit(inputs.training(rows, replace(order, sizes=trainer.accumulation.sizes)), loss_of)
    return trainer


def sum_of_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (N, H, K), targets (N,) -> the sum over heads of their mean cross-entropies."""
    num_heads = logits.shape[1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.repeat_interleave(num_heads)) * num_heads


def lars(model: nn.Module, config: LinearProbeConfig, heads: list[Head]) -> Lars:
    """One group a head, with its own learning rate over the config's."""
    probe: Any = model
    groups = [
        {"params": list(linear.parameters()), "lr_scale": head.base_lr / config.base_lr}
        for head, linear in zip(heads, probe.heads, strict=True)
    ]
    return Lars(groups, lr=config.base_lr, momentum=config.momentum, weight_decay=config.weight_decay)


def choose(
    probe: Any,
    heads: list[Head],
    inputs: ImageInputs | FeatureInputs,
    rows: np.ndarray,
    job: Job,
    progress: Progress,
) -> tuple[int, list[str]]:
    """The head with the best top1 on the held-out training images (of equals the one of the smallest loss), and notes on it and
    on the heads that diverged; UserError where all did.

    What all heads reach there is kept in `heads.json`. With one head there is nothing to choose.
    """
    lost = probe.diverged()
    if len(lost) == len(heads):
        raise UserError(
            f"every head diverged ({', '.join(head.name for head in heads)})",
            expected=f"weights whose norm stays below {MOST:g}",
            fix="lower base_lr, or lrs",
        )
    found = on_held_out(probe, len(heads), inputs, rows, progress) if len(rows) else []
    left = [place for place in range(len(heads)) if place not in lost]
    place = max(left, key=lambda i: (found[i][0], -found[i][1])) if found else 0
    if world().is_main:
        told = [_told(heads[i], *result, i in lost) for i, result in enumerate(found)]
        write_json(
            job.dir / HEADS_FILE, {"chosen": heads[place].name, "held_out_images": len(rows), "heads": told}
        )
    if len(heads) == 1:
        return 0, []
    on = f"on {len(rows)} images held out of train ({found[place][0]:.2f} %)"
    names = ", ".join(heads[i].name for i in lost)
    notes = [f"{len(lost)} of {len(heads)} heads diverged and were not chosen from: {names}"] if lost else []
    return place, [f"{heads[place].name}: the best of {len(heads)} heads {on}", *notes]


def _told(head: Head, top1: float, loss: float, diverged: bool) -> dict[str, Any]:
    """A head's line in `heads.json`."""
    return {
        "head": head.name,
        "top1": top1,
        "loss": loss if math.isfinite(loss) else None,
        "diverged": diverged,
    }


def on_held_out(
    probe: nn.Module,
    num_heads: int,
    inputs: ImageInputs | FeatureInputs,
    rows: np.ndarray,
    progress: Progress,
) -> list[tuple[float, float]]:
    """top1 in percent and mean loss in nats of every head, over all processes."""
    progress.stage("choose a head", len(rows))
    hits, losses = torch.zeros(2, num_heads, dtype=torch.float64)
    count = 0
    for _, targets, batch in inputs.held_out(rows):
        logits = inputs.feed.run(probe, batch).cpu()
        hits += (logits.argmax(dim=2) == targets[:, None]).sum(dim=0)
        losses += F.cross_entropy(
            logits.transpose(1, 2), targets[:, None].expand(-1, num_heads), reduction="none"
        ).sum(dim=0)
        count += len(targets)
        progress.step(count * world().size)
    *sums, total = sum_over_ranks([*hits.tolist(), *losses.tolist(), float(count)])
    return [
        (100 * hit / total, loss / total)
        for hit, loss in zip(sums[:num_heads], sums[num_heads:], strict=True)
    ]


def _one_head(
    inputs: ImageInputs | FeatureInputs, probe: nn.Module, place: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda batch: inputs.feed.run(probe, batch)[:, place]
