"""Frozen features of a backbone, computed once and cached for probes, nearest neighbours and few-shot tasks.

N images, n rows of a batch or chunk, D width, C channels, H W image.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import nn

from mae_bench.data.sets.index import cache_folder
from mae_bench.data.sets.source import BadImages, ImageSource
from mae_bench.data.sets.subset import Subset
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.errors import UserError
from mae_bench.export import digest_tensors
from mae_bench.files import json_digest
from mae_bench.job import Job, Outcome
from mae_bench.locks import file_lock
from mae_bench.models.cost import num_params
from mae_bench.models.vit import ViT
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.context import TaskContext
from tasks.imagenet.classify import load_at_size, require_pool, resolve_pool
from tasks.imagenet.config import Pool, PooledConfig
from tasks.imagenet.data import Data, open_data
from tasks.imagenet.evaluate import Feed, build_outcome, share_bad
from tasks.imagenet.feature_files import VALUES_FILE, FeatureFiles, compute_checksum

VERSION = 2  # of the cache; increase it when a code change alters the features or their files

C = TypeVar("C", bound=PooledConfig)


@dataclass(frozen=True)
class FeatureSet:
    """Pooled tokens of the last `layers` blocks, each after the final norm, concatenated."""

    pool: Pool
    layers: int = 1

    @property
    def name(self) -> str:
        return f"{self.pool}-{self.layers}"


class FrozenFeatures(nn.Module):
    """A frozen backbone in eval mode that returns several sets of features in one pass."""

    def __init__(self, vit: ViT, spec: BackboneSpec, sets: Sequence[FeatureSet]):
        super().__init__()
        for each in sets:
            require_pool(each.pool, spec)
        _require_layers(sets, spec)
        self.vit: Any = vit.requires_grad_(False).eval()
        self.spec, self.sets, self.num_prefix_tokens = spec, list(sets), spec.num_prefix_tokens
        self.widths = [vit.num_features * each.layers for each in sets]

    def select(self, sets: Sequence[FeatureSet]) -> "FrozenFeatures":
        """Return the same backbone with only these sets."""
        return FrozenFeatures(self.vit, self.spec, sets)

    def train(self, mode: bool = True) -> "FrozenFeatures":
        """Stay in eval mode: a frozen backbone has no drop path."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> features (N, sum of the sets' widths), the sets in their order."""
        layers = self._forward_layers(imgs)
        pooled = {
            "token": [prefix[:, 0] for prefix, _ in layers] if self.num_prefix_tokens else [],
            "avg": [patches.mean(dim=1) for _, patches in layers],
        }
        parts: list[torch.Tensor] = []
        for each in self.sets:
            parts += [self.vit.fc_norm(vector) for vector in pooled[each.pool][-each.layers :]]
        return torch.cat(parts, dim=1)

    def _forward_layers(self, imgs: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (prefix tokens, patch tokens) per block after the final norm, the last block last."""
        num_layers = max(each.layers for each in self.sets)
        if num_layers == 1:
            tokens = self.vit.forward_features(imgs)
            return [(tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :])]
        options = {"norm": True, "output_fmt": "NLC", "intermediates_only": True}
        if not self.num_prefix_tokens:
            layers = self.vit.forward_intermediates(imgs, indices=num_layers, **options)
            return [(patches[:, :0], patches) for patches in layers]
        layers = self.vit.forward_intermediates(
            imgs, indices=num_layers, return_prefix_tokens=True, **options
        )
        return [(prefix, patches) for patches, prefix in layers]


def _require_layers(sets: Sequence[FeatureSet], spec: BackboneSpec) -> None:
    """Raise UserError if the sets need more layers than the backbone provides."""
    most = max(each.layers for each in sets)
    if most > spec.depth:
        layers = ",".join(str(count) for count in sorted({min(each.layers, spec.depth) for each in sets}))
        raise UserError(
            f"the last {most} blocks of a backbone of depth {spec.depth}",
            expected="no more layers than blocks",
            fix=f"set tasks.NAME.layers=[{layers}]",
        )
    if spec.arch == "sam" and most > 1:
        raise UserError(
            "several layers of a backbone with windowed attention",
            expected="only its last layer",
            fix="set tasks.NAME.layers=[1]",
        )


@dataclass(frozen=True)
class SplitFeatures:
    """Memory-mapped features of one split of N images.

    Attributes:
        values: one array (N, width) in float32 per set.
        targets (N,): labels.
        decoded (N,): whether the image could be read.
    """

    values: tuple[np.ndarray, ...]
    targets: np.ndarray
    decoded: np.ndarray

    def decoded_rows(self) -> np.ndarray:
        """Return the rows of the images that could be read, sorted."""
        return np.flatnonzero(self.decoded)

    def load(self, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values (n, sum of the widths) and targets (n,) of these rows on the device."""
        targets = torch.from_numpy(self.targets[rows].astype(np.int64))
        values = np.concatenate([values[rows] for values in self.values], axis=1)
        return torch.from_numpy(values).to(device), targets.to(device)

    def iter_chunks(
        self, rows: np.ndarray, size: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `load` of at most `size` rows at a time."""
        for begin in range(0, len(rows), size):
            yield self.load(rows[begin : begin + size], device)


def load_features(
    context: TaskContext[PooledConfig], data: Data, model: FrozenFeatures
) -> dict[str, SplitFeatures]:
    """Return the features of "train" and "val" under the evaluation crop; all ranks compute the missing ones.

    Each set is cached separately below $MAE_BENCH_CACHE/features, so that protocols share the sets they have
    in common. The key covers the weights, the spec (the same weights with another number of heads, activation
    or mean are another backbone), the input (size, crop, precision), the set and the digest of the split. An
    interrupted computation resumes, and rows that are damaged are computed again.
    """
    config, spec = context.config, context.spec
    decisive = {
        "version": VERSION,
        "weights": digest_tensors(model.vit.state_dict()),
        "spec": spec.to_dict(),
        "feed": [spec.img_size, config.crop_pct, config.amp_dtype],
    }
    found = {}
    for split, images, bad in (("train", data.train, data.bad_train), ("val", data.val, data.bad_val)):
        key = json_digest(decisive | {"data": data.layout.split_digests[split]})
        found[split] = _load_split(
            context, cache_folder() / "features" / key[:32] / split, model, images, bad
        )
    return found


def _load_split(
    context: TaskContext[PooledConfig],
    folder: Path,
    model: FrozenFeatures,
    images: ImageSource,
    bad: BadImages,
) -> SplitFeatures:
    """Return the features in `folder`; compute those that are missing or damaged, under a lock per set."""
    widths = zip(model.sets, model.widths, strict=True)
    files = {each: FeatureFiles(folder / each.name, len(images), width) for each, width in widths}
    with ExitStack() as stack:
        if world().is_main:
            for each in sorted(files, key=lambda each: each.name):  # one order for all cells: no deadlock
                _prepare(files[each], context.progress, stack)
        gather_over_ranks(None)  # the other ranks wait for the files
        _require_shared(folder)
        # Images that could not be read are tried again each time
        missing = [each for each in model.sets if not files[each].open()[1].all()]
        if missing:
            _compute(context, [files[each] for each in missing], model.select(missing), images, bad)
            gather_over_ranks(None)
    values, checksums = zip(*(files[each].open() for each in model.sets), strict=True)
    decoded = np.logical_and.reduce([marks > 0 for marks in checksums])
    return SplitFeatures(values, np.asarray(images.targets), decoded)


def _prepare(files: FeatureFiles, progress: Progress, stack: ExitStack) -> None:
    """Lock the files of a set until `stack` closes, create those that are missing, and check the rest."""
    files.folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(file_lock(files.folder / VALUES_FILE, progress.note))
    files.reserve()
    num_damaged = files.discard_damaged()
    if num_damaged:
        progress.note(f"{num_damaged} rows of {files.folder} are damaged and computed again")


def _require_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not on this machine",
            expected="a cache that all machines share",
            fix="set MAE_BENCH_CACHE to a folder on a disk that all machines see",
        )


def _require_finite(features: torch.Tensor) -> None:
    """Raise UserError if features (n, D) are not finite: neighbours and few-shot would still give a score."""
    num_wrong = int((~features.isfinite().all(dim=1)).sum())
    if num_wrong:
        raise UserError(
            f"features of {num_wrong} of {len(features)} images are not finite",
            expected="a backbone whose weights and activations are finite in this precision",
            fix="use amp_dtype=float32, or look at the checkpoint: mae-bench inspect",
        )


def _compute(
    context: TaskContext[PooledConfig],
    files: list[FeatureFiles],
    model: FrozenFeatures,
    images: ImageSource,
    bad: BadImages,
) -> None:
    """Compute this rank's share of the rows missing in any set; `files` are those of `model.sets`."""
    opened = [each.open("r+") for each in files]
    missing = np.flatnonzero(~np.logical_and.reduce([checksums > 0 for _, checksums in opened]))
    gather_over_ranks(None)  # every rank has read the files before any rank writes to them
    context.progress.stage(f"features of {files[0].folder.parent.name}", len(missing))
    feed = Feed(context)
    done = 0
    for indices, _, imgs in feed.batches(Subset(images, missing), bad):
        rows = missing[indices.numpy()]
        features: Any = feed.run(model, imgs).cpu()
        _require_finite(features)
        for (values, checksums), part in zip(opened, features.split(model.widths, dim=1), strict=True):
            values[rows] = part.numpy()
            checksums[rows] = [compute_checksum(row) for row in part.contiguous().numpy()]
        done += len(rows) * world().size
        context.progress.step(done)
    share_bad(bad)
    for array in chain.from_iterable(opened):
        array.flush()


@dataclass(frozen=True)
class FrozenTask(Generic[C]):
    """A protocol on the cached features of one set.

    seconds_features: the time to load the features, or to compute them.
    """

    context: TaskContext[C]
    data: Data
    model: FrozenFeatures
    features: dict[str, SplitFeatures]
    seconds_features: float

    def build_outcome(
        self,
        metrics: dict[str, Metric],
        num_samples: int,
        seconds_eval: float,
        main_metric: str = "top1",
        artefacts: dict[str, str] | None = None,
    ) -> Outcome:
        """Return the Outcome on the validation images."""
        outcome = build_outcome(
            self.context,
            metrics,
            num_samples,
            seconds_eval,
            num_params(self.model),
            main_metric,
            notes=self.data.notes,
        )
        cost = outcome.cost | {"seconds_features": self.seconds_features}
        return replace(outcome, cost=cost, artefacts=outcome.artefacts | (artefacts or {}))


def build_feature_set(config: PooledConfig, spec: BackboneSpec) -> FeatureSet:
    """Return the set of the last layer under the config's pooling."""
    return FeatureSet(cast(Pool, resolve_pool(config, spec).global_pool))


def load_frozen_task(config: C, job: Job, progress: Progress) -> FrozenTask[C]:
    """Check the data, load the backbone and load or compute its features."""
    data = open_data(config)
    vit, spec, report = load_at_size(config, job.backbone)
    context = TaskContext(config, job, progress, data.layout, spec, report)
    model = FrozenFeatures(vit, spec, [build_feature_set(config, spec)]).to(context.device)
    began = time.monotonic()
    features = load_features(context, data, model)
    return FrozenTask(context, data, model, features, time.monotonic() - began)
