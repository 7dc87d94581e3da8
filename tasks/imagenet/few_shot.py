"""Few labels: a linear classifier on frozen features of some images a class, drawn several times."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F

from mae_bench.data.sets.subset import sample_per_class
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.intervals import mean_margin
from mae_bench.job import Job, Outcome
from mae_bench.progress import Progress
from mae_bench.record import Metric
from tasks.imagenet.config import FewShotConfig
from tasks.imagenet.evaluate import PREDICTIONS_FILE, Predictions, fits_memory, joined, said
from tasks.imagenet.features import SplitFeatures, frozen_task

Classify = Callable[[torch.Tensor], torch.Tensor]
DRAWS_FILE = "draws.json"
CHOSEN_ON = 10  # images a class, not drawn, that the weight decay is chosen on
MAX_ITERATIONS = 200
EPS = 1e-6


def run(config: FewShotConfig, job: Job, progress: Progress) -> Outcome:
    """For every number of labels: the mean top1 over config.draws and half the width of its 95 % interval (`mean_margin`).

    Draws and images follow from the job's seed. The single draws are kept in `draws.json`, of config.score's first draw the
    predictions too.
    """
    labels: dict[str, int | float] = {f"{shots}shot": shots for shots in config.shots}
    labels |= {f"{100 * share:g}%": share for share in config.shares}
    if config.score not in labels:
        raise UserError(f"score {config.score!r}", expected=f"one of {', '.join(labels)}")
    task = frozen_task(config, job, progress, f"top1_{config.score}")
    train, val = task.features["train"], task.features["val"]
    began = time.monotonic()
    plan = [(name, amount, draw) for name, amount in labels.items() for draw in range(config.draws)]
    progress.stage("few labels", len(plan))
    mine, kept = {}, None
    for done, (name, amount, draw) in enumerate(plan[world().rank :: world().size], 1):
        found = predictions_of_draw(config, train, val, amount, job.seed * config.draws + draw, task.device)
        mine[name, draw] = found.metrics()["top1"].value
        kept = found if (name, draw) == (config.score, 0) else kept
        progress.step(done * world().size)
    by_draw = {key: value for part in gather_over_ranks(mine) for key, value in part.items()}
    by_name = {name: [by_draw[name, draw] for draw in range(config.draws)] for name in labels}
    first = next(part for part in gather_over_ranks(kept) if part)
    if world().is_main:
        write_json(job.dir / DRAWS_FILE, by_name)
        first.save(job.dir / PREDICTIONS_FILE)
    metrics = {f"top1_{name}": Metric(fmean(values)) for name, values in by_name.items()}
    metrics |= {
        f"top1_{name}_margin": Metric(mean_margin(values), "%", "lower") for name, values in by_name.items()
    }
    outcome = task.outcome(metrics, len(val.rows()), time.monotonic() - began, {"draws": DRAWS_FILE})
    return replace(outcome, notes=[*_too_few(config, train), *outcome.notes])


def _too_few(config: FewShotConfig, train: SplitFeatures) -> list[str]:
    """A note where classes have fewer images than were to be drawn."""
    counts = np.bincount(train.targets[train.rows()])
    short = {shots: int((counts < shots).sum()) for shots in config.shots if (counts < shots).any()}
    return [
        f"{number} classes have fewer than {shots} images: all of theirs are drawn"
        for shots, number in short.items()
    ]


def predictions_of_draw(
    config: FewShotConfig,
    train: SplitFeatures,
    val: SplitFeatures,
    amount: int | float,
    seed: int,
    device: torch.device,
) -> Predictions:
    """What the classifier of one draw says of val; its weight decay is chosen on training images that were not drawn."""
    rows = train.rows()
    drawn = rows[sample_per_class(train.targets[rows], amount, seed)]
    left = np.setdiff1d(rows, drawn)
    if not len(left):
        name = "shares" if isinstance(amount, float) else "shots"
        raise UserError(
            f"every training image is drawn by {name}={amount:g}: the largest class has {np.bincount(train.targets[rows]).max()}",
            expected="some left to choose the weight decay on",
            fix=f"leave {amount:g} out of tasks.NAME.{name}",
        )
    judges = left[sample_per_class(train.targets[left], CHOSEN_ON, seed)]
    best, chosen = -1.0, None
    with fits_memory(f"{len(drawn)} labelled images", "leave the largest of shares away"):
        for classify in classifiers(config, *train.whole(drawn, device), int(train.targets.max()) + 1):
            accuracy = (
                _predictions(classify, train, judges, config.eval_batch_size, device).metrics()["top1"].value
            )
            if accuracy > best:
                best, chosen = accuracy, classify
        assert chosen is not None
        return _predictions(chosen, val, val.rows(), config.eval_batch_size, device)


def classifiers(
    config: FewShotConfig, features: torch.Tensor, targets: torch.Tensor, num_classes: int
) -> Iterator[Classify]:
    """One for each weight decay, on standardised features: (n, D) and (n,) -> functions (N, D) -> logits (N, K)."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0) + EPS
    for weight in decay_path(
        (features - mean) / std, targets, num_classes, sorted(config.weight_decays, reverse=True)
    ):
        yield partial(_logits, weight, mean, std)


def _logits(
    weight: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    return F.linear((values - mean) / std, weight[:, :-1], weight[:, -1])


def _predictions(
    classify: Classify, split: SplitFeatures, rows: np.ndarray, size: int, device: torch.device
) -> Predictions:
    batches = zip(torch.from_numpy(rows).split(size), split.chunks(rows, size, device), strict=True)
    return joined([said(classify(values), indices, targets) for indices, (values, targets) in batches])


def decay_path(
    features: torch.Tensor, targets: torch.Tensor, num_classes: int, decays: Sequence[float]
) -> Iterator[torch.Tensor]:
    """The weights (K, D + 1), biases last, that minimise mean cross-entropy + decay / 2 |W|^2, for each decay from the last's.

    Solved in float64: in float32 the line search ends where rounding hides the descent."""
    features = features.double()
    weight = features.new_zeros(num_classes, features.shape[1] + 1)
    for decay in decays:
        weight = weight.detach().clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [weight],
            max_iter=MAX_ITERATIONS,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-5,
            tolerance_change=0,
        )

        def loss() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023 - called before the next round
            matrix, bias = weight[:, :-1], weight[:, -1]  # noqa: B023
            value = (
                F.cross_entropy(F.linear(features, matrix, bias), targets) + decay / 2 * matrix.square().sum()
            )  # noqa: B023
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        yield weight.detach().float()
