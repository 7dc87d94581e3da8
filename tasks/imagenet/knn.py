"""Weighted nearest neighbours on frozen features, as DINO evaluates (arXiv 2104.14294, appendix F.1)."""

import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from mae_bench.engine.distributed import sum_over_ranks, world
from mae_bench.errors import UserError
from mae_bench.job import Job, Outcome
from mae_bench.progress import Progress
from mae_bench.record import Metric
from tasks.imagenet.config import KnnConfig
from tasks.imagenet.features import SplitFeatures, frozen_task

Chunk = tuple[torch.Tensor, torch.Tensor]


def run(config: KnnConfig, job: Job, progress: Progress) -> Outcome:
    """top1 and top5 for every k; the main metric is top1 of config.k. Nothing is drawn: every seed gives the same."""
    task = frozen_task(config, job, progress)
    began = time.monotonic()
    train, val = task.features["train"], task.features["val"]
    metrics, count = knn_metrics(config, train, val, task.data.num_classes, task.device, progress)
    return task.outcome(metrics, count, time.monotonic() - began)


def knn_metrics(
    config: KnnConfig, train: SplitFeatures, val: SplitFeatures, num_classes: int, device: torch.device, progress: Progress
) -> tuple[dict[str, Metric], int]:
    """Metrics over all processes, each with its share of the queries, and how many images were asked for."""
    known = train.rows()
    if len(known) < max(config.ks):
        raise UserError(f"k {max(config.ks)} with {len(known)} training images", expected="fewer neighbours than images")
    queries = val.rows()[world().rank :: world().size]
    progress.stage("neighbours", len(queries))
    hits = torch.zeros(len(config.ks), 2, dtype=torch.float64)
    done = 0
    for values, targets in val.chunks(queries, config.eval_batch_size, device):
        near, labels = nearest(values, train.chunks(known, config.chunk, device), max(config.ks))
        for row, k in enumerate(config.ks):
            top = vote(near[:, :k], labels[:, :k], num_classes, config.temperature)
            hits[row] += torch.stack([(top[:, :1] == targets[:, None]).sum(), (top == targets[:, None]).sum()]).cpu()
        done += len(targets)
        progress.step(done)
    *sums, count = sum_over_ranks([*hits.flatten().tolist(), float(len(queries))])
    percent = [100 * total / count for total in sums]
    by_k = dict(zip(config.ks, zip(percent[::2], percent[1::2], strict=True), strict=True))
    metrics = {"top1": Metric(by_k[config.k][0]), "top5": Metric(by_k[config.k][1])}
    return metrics | {f"top1_k{k}": Metric(top1) for k, (top1, _) in by_k.items()}, int(count)


def nearest(queries: torch.Tensor, train: Iterable[Chunk], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarity (N, k) of the k nearest training images, falling, and their labels (N, k).

    queries (N, D); train: chunks of features (n, D) and labels (n,). Never more than one chunk's similarities are held.
    """
    queries = F.normalize(queries, dim=1)
    near = queries.new_full((len(queries), 0), -torch.inf)
    labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for values, targets in train:
        similarity = queries @ F.normalize(values, dim=1).T
        near = torch.cat([near, similarity], dim=1)
        labels = torch.cat([labels, targets.expand(len(queries), -1)], dim=1)
        near, order = near.topk(min(k, near.shape[1]), dim=1)
        labels = labels.gather(1, order)
    return near, labels


def vote(similarity: torch.Tensor, labels: torch.Tensor, num_classes: int, temperature: float) -> torch.Tensor:
    """The (at most) five classes with the largest sums of exp(similarity / temperature); (N, k) -> (N, 5)."""
    weights = (similarity / temperature).exp()
    votes = torch.zeros(len(labels), num_classes, device=labels.device).scatter_add_(1, labels, weights)
    return votes.topk(min(5, num_classes), dim=1).indices
