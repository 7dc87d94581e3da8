"""Weighted nearest neighbours on frozen features, as DINO evaluates (arXiv 2104.14294, appendix F.1)."""

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
from tasks.imagenet.evaluate import PREDICTIONS_FILE, TOP, Predictions, fits_memory, gathered
from tasks.imagenet.features import SplitFeatures, frozen_task

Chunk = tuple[torch.Tensor, torch.Tensor]


def run(config: KnnConfig, job: Job, progress: Progress) -> Outcome:
    """top1 for every k, top5 and the kept predictions for config.k, which is the score. Every seed gives the same."""
    task = frozen_task(config, job, progress)
    began = time.monotonic()
    train, val = task.features["train"], task.features["val"]
    with fits_memory("the neighbours", f"set chunk={config.chunk // 2}: the scores stay"):
        found = predictions_by_k(config, train, val, task.data.num_classes, task.device, progress)
    scored = found[config.k]
    if world().is_main:
        scored.save(job.dir / PREDICTIONS_FILE)
    metrics = scored.metrics() | {f"top1_k{k}": each.metrics()["top1"] for k, each in found.items()}
    return task.outcome(metrics, len(scored.targets), time.monotonic() - began)


def predictions_by_k(
    config: KnnConfig,
    train: SplitFeatures,
    val: SplitFeatures,
    num_classes: int,
    device: torch.device,
    progress: Progress,
) -> dict[int, Predictions]:
    """What the neighbours of every validation image say, for every k; each process looks for those of its share."""
    known, most = train.rows(), max(config.ks)
    if len(known) < most:
        fit = [k for k in config.ks if k <= len(known)] or [len(known)]
        score = "" if config.k in fit else f" tasks.NAME.k={fit[-1]}"
        raise UserError(
            f"k {most} with {len(known)} training images",
            expected="no more neighbours than images",
            fix=f"set tasks.NAME.ks={fit}{score}".replace(", ", ","),
        )
    rows = val.rows()[world().rank :: world().size]
    queries, targets = val.whole(rows, device)
    progress.stage("neighbours", len(known))

    def chunks() -> Iterator[Chunk]:
        for number, chunk in enumerate(train.chunks(known, config.chunk, device)):
            progress.step(number * config.chunk)
            yield chunk

    near, labels = nearest(queries, chunks(), most, config.eval_batch_size)
    found = {}
    for k in config.ks:
        top, margin = vote(near[:, :k], labels[:, :k], num_classes, config.temperature)
        mine = Predictions(
            rows, targets.cpu().numpy(), top.cpu().numpy().astype(np.int32), margin.cpu().numpy()
        )
        found[k] = gathered([mine], len(val.known))
    return found


def nearest(
    queries: torch.Tensor, train: Iterable[Chunk], k: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarity (N, k) of the k nearest training images, falling, and their labels (N, k).

    queries (N, D); train: chunks of features (n, D) and labels (n,), which are read once. Never more similarities are held than
    those of `size` queries and one chunk.
    """
    queries = F.normalize(queries, dim=1)
    near = queries.new_full((len(queries), k), -torch.inf)
    labels = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for values, targets in train:
        values = F.normalize(values, dim=1)
        for begin in range(0, len(queries), size):
            part = slice(begin, begin + size)
            near[part], places = torch.cat([near[part], queries[part] @ values.T], dim=1).topk(k, dim=1)
            before = labels[part].gather(1, places.clamp(max=k - 1))
            labels[part] = torch.where(places < k, before, targets[(places - k).clamp(min=0)])
    return near, labels


def vote(
    similarity: torch.Tensor, labels: torch.Tensor, num_classes: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The (at most) five classes with the most votes, (N, k) -> (N, 5), -1 where fewer have one; the margin (N,) of the first.

    A neighbour's vote is exp(similarity / temperature), here as a share of all votes.
    """
    weights = (similarity / temperature).softmax(dim=1)
    votes = torch.zeros(len(labels), num_classes, device=labels.device).scatter_add_(1, labels, weights)
    values, classes = votes.topk(min(TOP, num_classes), dim=1)
    return classes.masked_fill(values == 0, -1), values[:, 0] - values[:, 1]
