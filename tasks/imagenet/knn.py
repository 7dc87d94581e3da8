"""Weighted nearest neighbours on frozen features, as DINO evaluates (arXiv 2104.14294, appendix F.1).

N queries, n training images of a chunk, k neighbours, D width, K classes.
"""

import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from mae_bench.engine.distributed import world
from mae_bench.errors import UserError
from mae_bench.job import Job, Outcome
from mae_bench.progress import Progress
from tasks.imagenet.config import KnnConfig
from tasks.imagenet.evaluate import (
    PREDICTIONS_FILE,
    TOP,
    Predictions,
    gather_predictions,
    report_out_of_memory,
)
from tasks.imagenet.features import FrozenTask, load_frozen_task

Chunk = tuple[torch.Tensor, torch.Tensor]  # features (n, D), labels (n,)


def run(config: KnnConfig, job: Job, progress: Progress) -> Outcome:
    """Compute top1 for every k, and top5 and predictions for config.k, the score; the seed has no effect."""
    task = load_frozen_task(config, job, progress)
    began = time.monotonic()
    with report_out_of_memory("the neighbours", f"set chunk={config.chunk // 2}; the scores do not change"):
        by_k = predict_by_k(task)
    scored = by_k[config.k]
    if world().is_main:
        scored.save(job.dir / PREDICTIONS_FILE)
    metrics = scored.metrics()
    metrics |= {f"top1_k{k}": predictions.metrics()["top1"] for k, predictions in by_k.items()}
    return task.build_outcome(metrics, len(scored.targets), time.monotonic() - began)


def predict_by_k(task: FrozenTask[KnnConfig]) -> dict[int, Predictions]:
    """Return the predictions on val for every k; each rank searches for its share of the images."""
    config, device, progress = task.context.config, task.context.device, task.context.progress
    train, val = task.features["train"], task.features["val"]
    train_rows, max_k = train.decoded_rows(), max(config.ks)
    _require_neighbours(config, len(train_rows))
    rows = val.decoded_rows()[world().rank :: world().size]
    queries, targets = val.load(rows, device)
    progress.stage("neighbours", len(train_rows))

    def iter_chunks() -> Iterator[Chunk]:
        for number, chunk in enumerate(train.iter_chunks(train_rows, config.chunk, device)):
            progress.step(number * config.chunk)
            yield chunk

    similarity, labels = find_nearest(queries, iter_chunks(), max_k, config.eval_batch_size)
    by_k = {}
    for k in config.ks:
        top, margin = vote(similarity[:, :k], labels[:, :k], task.data.num_classes, config.temperature)
        mine = Predictions(
            rows, targets.cpu().numpy(), top.cpu().numpy().astype(np.int32), margin.cpu().numpy()
        )
        by_k[k] = gather_predictions([mine], len(val.decoded))
    return by_k


def _require_neighbours(config: KnnConfig, num_images: int) -> None:
    """Raise UserError if there are fewer training images than the largest k."""
    if num_images >= max(config.ks):
        return
    ks = [k for k in config.ks if k <= num_images] or [num_images]
    score = "" if config.k in ks else f" tasks.NAME.k={ks[-1]}"
    raise UserError(
        f"k {max(config.ks)} with {num_images} training images",
        expected="no more neighbours than images",
        fix=f"set tasks.NAME.ks=[{','.join(map(str, ks))}]{score}",
    )


def find_nearest(
    queries: torch.Tensor, train: Iterable[Chunk], k: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine similarities (N, k), falling, and labels (N, k) of the k nearest training images.

    queries (N, D); train: chunks of features (n, D) and labels (n,), which are read once. At most size x n
    similarities are in memory at a time.
    """
    queries = F.normalize(queries, dim=1)
    similarity = queries.new_full((len(queries), k), -torch.inf)
    labels = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for values, targets in train:
        values = F.normalize(values, dim=1)
        for begin in range(0, len(queries), size):
            part = slice(begin, begin + size)
            candidates = torch.cat([similarity[part], queries[part] @ values.T], dim=1)  # (size, k + n)
            similarity[part], places = candidates.topk(k, dim=1)
            previous = labels[part].gather(1, places.clamp(max=k - 1))
            labels[part] = torch.where(places < k, previous, targets[(places - k).clamp(min=0)])
    return similarity, labels


def vote(
    similarity: torch.Tensor, labels: torch.Tensor, num_classes: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the classes with the most votes, (N, k) -> (N, at most 5), and the margin (N,) of the first.

    The vote of a neighbour is exp(similarity / temperature), as a share of all votes. Places without votes
    are -1.
    """
    weights = (similarity / temperature).softmax(dim=1)
    votes = torch.zeros(len(labels), num_classes, device=labels.device).scatter_add_(1, labels, weights)
    values, classes = votes.topk(min(TOP, num_classes), dim=1)
    return classes.masked_fill(values == 0, -1), values[:, 0] - values[:, 1]
