"""Linear probing: one or many heads on frozen features, trained in one pass (arXiv 2111.06377, Table 10).

N images, n rows of a split, H heads, D width, K classes.
"""

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
from tasks.context import TaskContext
from tasks.imagenet.classify import BatchStream, build_stream, end_training, forward_head, load_at_size
from tasks.imagenet.config import LinearProbeConfig
from tasks.imagenet.data import Data, open_data
from tasks.imagenet.evaluate import (
    PREDICTIONS_FILE,
    Feed,
    Inputs,
    add_bad_images,
    add_epochs,
    build_outcome,
    predict,
    share_bad,
    watch_epochs,
)
from tasks.imagenet.features import (
    FeatureSet,
    FrozenFeatures,
    SplitFeatures,
    build_feature_set,
    load_features,
)
from tasks.imagenet.lars import MAX_NORM, Lars
from tasks.trained import train_once

HEAD_STD = 0.01
BATCH_NORM_EPS = 1e-6
HEADS_FILE = "heads.json"


@dataclass(frozen=True)
class Head:
    """One of the linear heads that are trained side by side."""

    base_lr: float
    features: FeatureSet

    @property
    def name(self) -> str:
        return f"{self.features.name}, base_lr {self.base_lr:g}"


def build_heads(config: LinearProbeConfig, spec: BackboneSpec) -> list[Head]:
    """Return the grid of heads in the order lrs x pools x layers."""
    pools = config.pools or [build_feature_set(config, spec).pool]
    grid = product(config.lrs or [config.base_lr], pools, config.layers)
    return [Head(lr, FeatureSet(pool, layers)) for lr, pool, layers in grid]


class Probe(nn.Module):
    """Linear heads on frozen features, after one BatchNorm without affine parameters per set of features.

    The probe takes features as input, or images once a backbone is attached. It has no parameters but the
    heads'; these are drawn from the seed and the width only, so that a head does not depend on the other
    heads.
    """

    def __init__(
        self, heads: list[Head], sets: list[FeatureSet], widths: list[int], num_classes: int, seed: int
    ):
        super().__init__()
        self._backbone: list[FrozenFeatures] = []  # a list hides it from train() and state_dict()
        self._widths = widths
        self._places = [sets.index(head.features) for head in heads]
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS) for width in widths
        )
        self.heads = nn.ModuleList(_build_linear(widths[place], num_classes, seed) for place in self._places)

    def attach(self, backbone: FrozenFeatures) -> "Probe":
        """Take images instead of features as input, and return self."""
        self._backbone = [backbone]
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W), or features (N, sum of the sets' widths) -> logits (N, H, K)."""
        features = self._backbone[0](inputs) if self._backbone else inputs
        return forward_head(self._forward_heads, features, self.training)

    def _forward_heads(self, features: torch.Tensor) -> torch.Tensor:
        parts = torch.split(features, self._widths, dim=1)
        normed = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        logits = [head(normed[place]) for head, place in zip(self.heads, self._places, strict=True)]
        return torch.stack(logits, dim=1)

    def diverged(self) -> list[int]:
        """Return the places of the heads that Lars no longer updates because their weights are too large."""
        norms = [head.get_parameter("weight").norm() for head in self.heads]
        return [place for place, norm in enumerate(norms) if not norm < MAX_NORM]


def _build_linear(width: int, num_classes: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, -5))
    with torch.no_grad():
        nn.init.trunc_normal_(head.weight, std=HEAD_STD, generator=generator)
        head.bias.zero_()
    return head


class ImageInputs:
    """Images as the probe's input: random crops and flips in training, the centre crop in evaluation."""

    def __init__(self, context: TaskContext[LinearProbeConfig], data: Data):
        self.context, self.data, self.feed = context, data, Feed(context)

    def build_stream(self, rows: np.ndarray, order: TrainingOrder) -> BatchStream:
        """Return a function (start, stop) -> training batches of those steps, from these rows of train."""
        return build_stream(self.context, Subset(self.data.train, rows), order, auto_augment=None)

    def prepare(self, batch: Batch) -> torch.Tensor:
        """Return the model's input of a training batch."""
        spec = self.context.spec
        return normalize(batch.imgs.to(self.context.device, non_blocking=True), spec.mean, spec.std)

    def iter_held_out(self, rows: np.ndarray) -> Iterator[Inputs]:
        """Yield this rank's share of these rows of train."""
        return self.feed.batches(Subset(self.data.train, rows), self.data.bad_train)

    def iter_val(self) -> Iterator[Inputs]:
        """Yield this rank's share of val."""
        return self.feed.batches(self.data.val, self.data.bad_val)


class FeatureInputs:
    """Cached features as the probe's input, the same in every epoch; same methods as ImageInputs."""

    def __init__(self, context: TaskContext[LinearProbeConfig], features: dict[str, SplitFeatures]):
        self.context, self.features, self.feed = context, features, Feed(context)

    def build_stream(self, rows: np.ndarray, order: TrainingOrder) -> BatchStream:
        train = self.features["train"]

        def stream(start: int, stop: int) -> Iterator[Batch]:
            for items in order.batches(start, stop):
                chosen = rows[[index for _, index, _ in items]]
                values, targets = train.load(chosen, torch.device("cpu"))
                yield Batch(values, targets, torch.from_numpy(chosen), start=items[0][2])

        return stream

    def prepare(self, batch: Batch) -> torch.Tensor:
        return batch.imgs.to(self.context.device, non_blocking=True)

    def iter_held_out(self, rows: np.ndarray) -> Iterator[Inputs]:
        return self._iter_share("train", rows)

    def iter_val(self) -> Iterator[Inputs]:
        return self._iter_share("val", self.features["val"].decoded_rows())

    def _iter_share(self, split: str, rows: np.ndarray) -> Iterator[Inputs]:
        mine, size = rows[world().rank :: world().size], self.context.config.eval_batch_size
        chunks = self.features[split].iter_chunks(mine, size, self.context.device)
        for number, (values, targets) in enumerate(chunks):
            indices = torch.from_numpy(mine[number * size : (number + 1) * size])
            yield indices, targets.cpu(), values


ProbeInputs = ImageInputs | FeatureInputs


def run(config: LinearProbeConfig, job: Job, progress: Progress) -> Outcome:
    """Train the heads with LARS, choose one on images held out of train and score it on val.

    The main metric is top1 of the last epoch.
    """
    data = open_data(config)
    vit, spec, report = load_at_size(config, job.backbone)
    context = TaskContext(config, job, progress, data.layout, spec, report)
    heads = build_heads(config, spec)
    sets = list(dict.fromkeys(head.features for head in heads))
    backbone = FrozenFeatures(vit, spec, sets).to(context.device)
    probe = Probe(heads, sets, backbone.widths, data.num_classes, job.seed).to(context.device)
    inputs: ProbeInputs
    cost: dict[str, float] = {}
    if config.features == "cached":
        began = time.monotonic()
        features = load_features(context, data, backbone)
        cost["seconds_features"] = time.monotonic() - began
        inputs, usable = FeatureInputs(context, features), features["train"].decoded_rows()
    else:
        inputs, usable = ImageInputs(context, data), np.arange(len(data.train))
        probe.attach(backbone)
    held_out = usable[:0]
    if config.holdout:
        held_out = usable[sample_per_class(data.train.targets[usable], config.holdout, seed=0)]
    rows = np.setdiff1d(usable, held_out)
    trained, training = train_once(
        context, "train", probe, lambda: end_training(train_heads(context, data, probe, heads, inputs, rows))
    )
    add_bad_images(data, training)
    trained.eval()
    began = time.monotonic()
    place, notes = choose_head(context, trained, heads, inputs, held_out)
    predictions = predict(_select_head(inputs, trained, place), inputs.iter_val(), len(data.val), progress)
    share_bad(data.bad_val)
    if world().is_main:
        predictions.save(job.dir / PREDICTIONS_FILE)
    seconds, notes = time.monotonic() - began, [*notes, *data.notes]
    size = num_params(vit) + num_params(probe.heads[place])
    outcome = build_outcome(
        context, predictions.metrics(), len(predictions.targets), seconds, size, notes=notes
    )
    outcome = replace(outcome, artefacts=outcome.artefacts | {"heads": HEADS_FILE}, cost=outcome.cost | cost)
    return add_epochs(context, outcome, training)


def train_heads(
    context: TaskContext[LinearProbeConfig],
    data: Data,
    probe: Probe,
    heads: list[Head],
    inputs: ProbeInputs,
    rows: np.ndarray,
) -> Trainer:
    """Train all heads on these rows of train; the sum of their losses trains each one independently."""
    config, job, progress = context.config, context.job, context.progress
    order = TrainingOrder(len(rows), config.global_batch_size, job.seed, world().rank, world().size)
    optimizer = partial(build_lars, config=config, heads=heads)
    trainer = Trainer(job, config, probe, optimizer, order.steps_per_epoch, progress, data.bad_train)
    if min(trainer.accumulation.sizes) == 1:
        raise UserError(
            f"{trainer.accumulation}: a single image before a BatchNorm",
            expected="two images or more, which have a variance",
            fix="another device_batch_size, or a larger global_batch_size",
        )

    def compute_metrics(model: nn.Module) -> dict[str, Metric]:
        first = _select_head(inputs, model.eval(), 0)
        return predict(first, inputs.iter_val(), len(data.val), progress).metrics()

    def compute_loss(model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        targets = batch.targets.to(context.device, non_blocking=True)
        return sum_losses(model(inputs.prepare(batch)), targets)

    watch_epochs(context, trainer, compute_metrics)
    order = replace(order, sizes=trainer.accumulation.sizes)
    trainer.fit(inputs.build_stream(rows, order), compute_loss)
    return trainer


def sum_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (N, H, K), targets (N,) -> the sum over the heads of their mean cross-entropies."""
    num_heads = logits.shape[1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.repeat_interleave(num_heads)) * num_heads


def build_lars(model: nn.Module, config: LinearProbeConfig, heads: list[Head]) -> Lars:
    """Return Lars with one parameter group per head, whose lr is scaled by the head's base_lr."""
    probe: Any = model
    groups = [
        {"params": list(linear.parameters()), "lr_scale": head.base_lr / config.base_lr}
        for head, linear in zip(heads, probe.heads, strict=True)
    ]
    return Lars(groups, lr=config.base_lr, momentum=config.momentum, weight_decay=config.weight_decay)


def choose_head(
    context: TaskContext[LinearProbeConfig],
    probe: Any,
    heads: list[Head],
    inputs: ProbeInputs,
    rows: np.ndarray,
) -> tuple[int, list[str]]:
    """Return the place of the head with the best top1 on the held-out `rows`, and notes for the record.

    Ties are broken by the smaller loss; diverged heads are not chosen. The results of all heads are saved in
    `heads.json`. Raise UserError if every head diverged.
    """
    diverged = probe.diverged()
    if len(diverged) == len(heads):
        raise UserError(
            f"every head diverged ({', '.join(head.name for head in heads)})",
            expected=f"weights whose norm stays below {MAX_NORM:g}",
            fix="lower base_lr, or lrs",
        )
    results = score_held_out(context, probe, len(heads), inputs, rows) if len(rows) else []
    left = [place for place in range(len(heads)) if place not in diverged]
    place = max(left, key=lambda i: (results[i][0], -results[i][1])) if results else 0
    if world().is_main:
        entries = [
            _describe_head(heads[i], *result, diverged=i in diverged) for i, result in enumerate(results)
        ]
        value = {"chosen": heads[place].name, "held_out_images": len(rows), "heads": entries}
        write_json(context.job.dir / HEADS_FILE, value)
    if len(heads) == 1:
        return 0, []
    chosen_on = f"on {len(rows)} images held out of train ({results[place][0]:.2f} %)"
    notes = [f"{heads[place].name}: the best of {len(heads)} heads {chosen_on}"]
    if diverged:
        names = ", ".join(heads[i].name for i in diverged)
        notes.append(f"{len(diverged)} of {len(heads)} heads diverged and were not chosen from: {names}")
    return place, notes


def _describe_head(head: Head, top1: float, loss: float, *, diverged: bool) -> dict[str, Any]:
    """Return the entry of a head in `heads.json`."""
    return {
        "head": head.name,
        "top1": top1,
        "loss": loss if math.isfinite(loss) else None,
        "diverged": diverged,
    }


def score_held_out(
    context: TaskContext[LinearProbeConfig],
    probe: nn.Module,
    num_heads: int,
    inputs: ProbeInputs,
    rows: np.ndarray,
) -> list[tuple[float, float]]:
    """Return top1 in percent and mean loss in nats of every head, over all ranks."""
    context.progress.stage("choose a head", len(rows))
    hits, losses = torch.zeros(2, num_heads, dtype=torch.float64)
    count = 0
    for _, targets, batch in inputs.iter_held_out(rows):
        logits = inputs.feed.run(probe, batch).cpu()  # (N, H, K)
        hits += (logits.argmax(dim=2) == targets[:, None]).sum(dim=0)
        labels = targets[:, None].expand(-1, num_heads)
        losses += F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=0)
        count += len(targets)
        context.progress.step(count * world().size)
    *sums, total = sum_over_ranks([*hits.tolist(), *losses.tolist(), float(count)])
    pairs = zip(sums[:num_heads], sums[num_heads:], strict=True)
    return [(100 * hit / total, loss / total) for hit, loss in pairs]


def _select_head(inputs: ProbeInputs, probe: nn.Module, place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function inputs -> logits (N, K) of one head."""
    return lambda batch: inputs.feed.run(probe, batch)[:, place]
