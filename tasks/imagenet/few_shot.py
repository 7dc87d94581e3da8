"""A linear classifier on frozen features of a few labelled images per class, averaged over random draws.

N images, n labelled images, D width, K classes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

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
from tasks.imagenet.evaluate import (
    PREDICTIONS_FILE,
    Predictions,
    concatenate_predictions,
    predictions_from_logits,
    report_out_of_memory,
)
from tasks.imagenet.features import FrozenTask, SplitFeatures, load_frozen_task

Classify = Callable[[torch.Tensor], torch.Tensor]  # features (N, D) -> logits (N, K)
DRAWS_FILE = "draws.json"
CHOSEN_ON = 10  # images per class, outside the draw, that the weight decay is chosen on
MAX_ITERATIONS = 200
EPS = 1e-6


def run(config: FewShotConfig, job: Job, progress: Progress) -> Outcome:
    """Compute, per number of labels, the mean top1 over config.draws and half the width of its 95 % interval.

    The job's seed determines the draws. The top1 of every draw is saved in `draws.json`, and the predictions
    of the first draw of config.score in `predictions.npz`.
    """
    amounts: dict[str, int | float] = {f"{shots}shot": shots for shots in config.shots}
    amounts |= {f"{100 * share:g}%": share for share in config.shares}
    if config.score not in amounts:
        raise UserError(f"score {config.score!r}", expected=f"one of {', '.join(amounts)}")
    task = load_frozen_task(config, job, progress)
    began = time.monotonic()
    top1, scored = score_draws(task, amounts)
    if world().is_main:
        write_json(job.dir / DRAWS_FILE, top1)
        scored.save(job.dir / PREDICTIONS_FILE)
    metrics = {f"top1_{name}": Metric(fmean(values)) for name, values in top1.items()}
    metrics |= {
        f"top1_{name}_margin": Metric(mean_margin(values), "%", "lower") for name, values in top1.items()
    }
    num_samples, seconds = len(task.features["val"].decoded_rows()), time.monotonic() - began
    outcome = task.build_outcome(
        metrics, num_samples, seconds, f"top1_{config.score}", artefacts={"draws": DRAWS_FILE}
    )
    return replace(outcome, notes=[*_note_small_classes(config, task.features["train"]), *outcome.notes])


def score_draws(
    task: FrozenTask[FewShotConfig], amounts: dict[str, int | float]
) -> tuple[dict[str, list[float]], Predictions]:
    """Return top1 per number of labels and draw, and the predictions of the first draw of config.score.

    The draws are shared out over the ranks.
    """
    config, context = task.context.config, task.context
    plan = list(product(amounts, range(config.draws)))
    context.progress.stage("few labels", len(plan))
    mine, scored = {}, None
    for done, (name, draw) in enumerate(plan[world().rank :: world().size], 1):
        predictions = predict_draw(task, amounts[name], context.job.seed * config.draws + draw)
        mine[name, draw] = predictions.metrics()["top1"].value
        if (name, draw) == (config.score, 0):
            scored = predictions
        context.progress.step(done * world().size)
    by_draw: dict[tuple[str, int], float] = {}
    for part in gather_over_ranks(mine):
        by_draw |= part
    top1 = {name: [by_draw[name, draw] for draw in range(config.draws)] for name in amounts}
    return top1, next(part for part in gather_over_ranks(scored) if part)


def _note_small_classes(config: FewShotConfig, train: SplitFeatures) -> list[str]:
    """Return notes on the classes that have fewer images than are drawn."""
    counts = np.bincount(train.targets[train.decoded_rows()])
    notes = []
    for shots in config.shots:
        num_short = int((counts < shots).sum())
        if num_short:
            notes.append(f"{num_short} classes have fewer than {shots} images: all of their images are drawn")
    return notes


def predict_draw(task: FrozenTask[FewShotConfig], amount: int | float, seed: int) -> Predictions:
    """Return the predictions on val of the classifier of one draw.

    amount: images per class, or their share. The weight decay is chosen on training images outside the draw.
    """
    config, device = task.context.config, task.context.device
    train, val = task.features["train"], task.features["val"]
    rows = train.decoded_rows()
    drawn = rows[sample_per_class(train.targets[rows], amount, seed)]
    left = np.setdiff1d(rows, drawn)
    if not len(left):
        name = "shares" if isinstance(amount, float) else "shots"
        largest = np.bincount(train.targets[rows]).max()
        raise UserError(
            f"every training image is drawn by {name}={amount:g}: the largest class has {largest}",
            expected="images left over to choose the weight decay on",
            fix=f"remove {amount:g} from tasks.NAME.{name}",
        )
    chosen_on = left[sample_per_class(train.targets[left], CHOSEN_ON, seed)]
    best, chosen = -1.0, None
    with report_out_of_memory(f"{len(drawn)} labelled images", "remove the largest of shares"):
        for classify in fit_classifiers(config, *train.load(drawn, device), int(train.targets.max()) + 1):
            predictions = _predict(classify, train, chosen_on, config.eval_batch_size, device)
            accuracy = predictions.metrics()["top1"].value
            if accuracy > best:
                best, chosen = accuracy, classify
        assert chosen is not None
        return _predict(chosen, val, val.decoded_rows(), config.eval_batch_size, device)


def fit_classifiers(
    config: FewShotConfig, features: torch.Tensor, targets: torch.Tensor, num_classes: int
) -> Iterator[Classify]:
    """Yield one classifier per weight decay, fitted to standardised features (n, D) and targets (n,)."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0) + EPS
    decays = sorted(config.weight_decays, reverse=True)
    for weight in solve_decay_path((features - mean) / std, targets, num_classes, decays):
        yield partial(_compute_logits, weight, mean, std)


def _compute_logits(
    weight: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    return F.linear((values - mean) / std, weight[:, :-1], weight[:, -1])


def _predict(
    classify: Classify, split: SplitFeatures, rows: np.ndarray, size: int, device: torch.device
) -> Predictions:
    parts = []
    for number, (values, targets) in enumerate(split.iter_chunks(rows, size, device)):
        indices = torch.from_numpy(rows[number * size : (number + 1) * size])
        parts.append(predictions_from_logits(classify(values), indices, targets))
    return concatenate_predictions(parts)


def solve_decay_path(
    features: torch.Tensor, targets: torch.Tensor, num_classes: int, decays: Sequence[float]
) -> Iterator[torch.Tensor]:
    """Yield the weights (K, D + 1), bias last, that minimise mean cross-entropy + decay / 2 |W|^2, per decay.

    Each solution starts from the previous one. Solved in float64: in float32 the line search stops where
    rounding hides the descent.
    """
    features = features.double()
    weight = features.new_zeros(num_classes, features.shape[1] + 1)
    for decay in decays:
        weight = _minimise(features, targets, weight, decay)
        yield weight.float()


def _minimise(
    features: torch.Tensor, targets: torch.Tensor, start: torch.Tensor, decay: float
) -> torch.Tensor:
    """Return the weights (K, D + 1) that L-BFGS reaches from `start`."""
    weight = start.clone().requires_grad_(True)
    optimizer: Any = torch.optim.LBFGS(
        [weight],
        max_iter=MAX_ITERATIONS,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-5,
        tolerance_change=0,
    )

    def compute_loss() -> torch.Tensor:
        optimizer.zero_grad()
        matrix, bias = weight[:, :-1], weight[:, -1]
        loss: Any = F.cross_entropy(F.linear(features, matrix, bias), targets)
        loss = loss + decay / 2 * matrix.square().sum()
        loss.backward()
        return loss  # type: ignore[no-any-return]

    optimizer.step(compute_loss)
    return weight.detach()
