"""Frozen features of a backbone, several sets in one pass, and the cache that probes, neighbours and few-shot tests share."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from backbones.translating.report import ConversionReport
from mae_bench.data.sets.fetch import file_lock
from mae_bench.data.sets.index import cache_folder
from mae_bench.data.sets.source import BadImages, ImageSource
from mae_bench.data.sets.subset import Subset
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.errors import UserError
from mae_bench.files import is_full, json_digest, write_json
from mae_bench.job import Job, Outcome
from mae_bench.models.cost import num_params
from mae_bench.models.vit import ViT
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.imagenet.classify import load_at_size, pooled_as_it_is, require_pool
from tasks.imagenet.config import Pool, PooledConfig
from tasks.imagenet.data import Data, open_data
from tasks.imagenet.evaluate import Feed, outcome_of, share_bad

VERSION = 1  # raised when a change of code changes the features
DONE = "done.json"


@dataclass(frozen=True)
class FeatureSet:
    """The last `layers` blocks, each behind the final norm: their class tokens or the averages of their patch tokens, joined."""

    pool: Pool
    layers: int = 1

    @property
    def name(self) -> str:
        return f"{self.pool}-{self.layers}"


class FrozenFeatures(nn.Module):
    """A backbone in eval mode without gradients. N images, D width of its output."""

    def __init__(self, vit: ViT, spec: BackboneSpec, sets: Sequence[FeatureSet]):
        super().__init__()
        for each in sets:
            require_pool(each.pool, spec)
        if (most := max(each.layers for each in sets)) > spec.depth:
            fix = f"set tasks.NAME.layers={sorted({min(each.layers, spec.depth) for each in sets})}".replace(
                ", ", ","
            )
            raise UserError(
                f"the last {most} blocks of a backbone of depth {spec.depth}",
                expected="no more layers than blocks",
                fix=fix,
            )
        if spec.arch == "sam" and most > 1:
            given = "several layers of a backbone with windowed attention"
            raise UserError(given, expected="its last alone", fix="set tasks.NAME.layers=[1]")
        self.vit: Any = vit.requires_grad_(False).eval()
        self.spec, self.sets, self.num_prefix_tokens = spec, list(sets), spec.num_prefix_tokens
        self.widths = [vit.num_features * each.layers for each in sets]

    def only(self, sets: Sequence[FeatureSet]) -> "FrozenFeatures":
        """The same backbone for these sets alone."""
        return FrozenFeatures(self.vit, self.spec, sets)

    def train(self, mode: bool = True) -> "FrozenFeatures":
        """Stays in eval mode: no drop path under a frozen backbone."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, sum of the sets' widths), the sets one after another."""
        layers = self._layers(imgs)
        pooled = {
            "token": [prefix[:, 0] for prefix, _ in layers] if self.num_prefix_tokens else [],
            "avg": [patches.mean(dim=1) for _, patches in layers],
        }
        parts = [
            self.vit.fc_norm(vector) for each in self.sets for vector in pooled[each.pool][-each.layers :]
        ]
        return torch.cat(parts, dim=1)

    def _layers(self, imgs: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Prefix and patch tokens of the last blocks behind the final norm, the last at the end."""
        count = max(each.layers for each in self.sets)
        if count == 1:
            tokens = self.vit.forward_features(imgs)
            return [(tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :])]
        options = {"norm": True, "output_fmt": "NLC", "intermediates_only": True}
        if not self.num_prefix_tokens:
            return [
                (patches[:, :0], patches)
                for patches in self.vit.forward_intermediates(imgs, indices=count, **options)
            ]
        found = self.vit.forward_intermediates(imgs, indices=count, return_prefix_tokens=True, **options)
        return [(prefix, patches) for patches, prefix in found]


@dataclass(frozen=True)
class SplitFeatures:
    """Features of one split, memory-mapped. values: one (N, width) float32 a set, a row an image; known (N,): whether the image
    did decode."""

    values: tuple[np.ndarray, ...]
    targets: np.ndarray
    known: np.ndarray

    def rows(self) -> np.ndarray:
        """The rows that are known, sorted."""
        return np.flatnonzero(self.known)

    def whole(self, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All sets' values side by side (n, widths) and targets (n,) of these rows on the device."""
        targets = torch.from_numpy(self.targets[rows].astype(np.int64))
        values = np.concatenate([values[rows] for values in self.values], axis=1)
        return torch.from_numpy(values).to(device), targets.to(device)

    def chunks(
        self, rows: np.ndarray, size: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(values (n, width), targets (n,)) on the device, at most `size` rows at a time."""
        for begin in range(0, len(rows), size):
            yield self.whole(rows[begin : begin + size], device)


def cached_features(
    model: FrozenFeatures,
    data: Data,
    config: PooledConfig,
    spec: BackboneSpec,
    device: torch.device,
    progress: Progress,
) -> dict[str, SplitFeatures]:
    """Features of "train" and "val" under the evaluation crop, from the cache or made now by all processes together.

    Each set of features is kept by itself, so that protocols share what they have in common. The key: the weights themselves,
    the spec (the same weights with other heads, another activation or another mean are another backbone), how images are fed
    (size, crop, precision), the set, and the data's digest. What was made before an interruption
    is not made again. They lie below $MAE_BENCH_CACHE/features.
    """
    size = config.img_size or spec.img_size
    key = json_digest(
        {
            "version": VERSION,
            "weights": weights_digest(model.vit),
            "spec": spec.to_dict(),
            "feed": [size, config.crop_pct, config.amp_dtype],
            "data": data.report.digest,
        }
    )
    folder = cache_folder() / "features" / key[:32]
    feed = Feed(config, spec, device)
    made = {}
    for split, images, bad in (("train", data.train, data.bad_train), ("val", data.val, data.bad_val)):
        made[split] = _split(folder / split, model, images, bad, feed, progress, f"features of {split}")
    return made


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b""
        )
    return digest.hexdigest()


def _split(
    folder: Path,
    model: FrozenFeatures,
    images: ImageSource,
    bad: BadImages,
    feed: Feed,
    progress: Progress,
    stage: str,
) -> SplitFeatures:
    places = {each: folder / each.name for each in model.sets}
    widths = dict(zip(model.sets, model.widths, strict=True))
    with ExitStack() as stack:
        if world().is_main:
            for each in sorted(
                places, key=lambda each: each.name
            ):  # in one order, or two cells could wait for each other
                places[each].mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(places[each] / DONE))
                _reserve(places[each], len(images), widths[each])
        gather_over_ranks(None)  # the others wait until the files are there
        _require_shared(folder)
        if missing := [each for each in model.sets if not _is_whole(places[each])]:
            _fill([places[each] for each in missing], model.only(missing), images, bad, feed, progress, stage)
            gather_over_ranks(None)
            for each in missing if world().is_main else ():
                write_json(places[each] / DONE, {"images": len(images), "bad": bad.names})
        for place in places.values() if world().is_main else ():
            for name, reason in json.loads((place / DONE).read_text(encoding="utf-8"))["bad"].items():
                bad.add(name, reason)
    known = np.logical_and.reduce([np.load(place / "known.npy") for place in places.values()])
    values = tuple(np.load(place / "values.npy", mmap_mode="r") for place in places.values())
    return SplitFeatures(values, np.asarray(images.targets), known)


def _is_whole(place: Path) -> bool:
    """Whether nothing is left to be made; images that could not be read are tried again each time, as long as there are some."""
    done = place / DONE
    return done.is_file() and not json.loads(done.read_text(encoding="utf-8"))["bad"]


def _require_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not on this machine",
            expected="a cache that all machines share",
            fix="set MAE_BENCH_CACHE to a folder on a disk that all of them see",
        )


def _reserve(folder: Path, count: int, width: int) -> None:
    """Files of their final size, so that a full disk is met here and not in the middle."""
    for name, dtype, shape in (("known.npy", np.bool_, (count,)), ("values.npy", np.float32, (count, width))):
        if (folder / name).is_file():
            continue
        part = folder / f"{name}.part"
        try:
            array = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
            array.flush()
            with part.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        except OSError as error:
            part.unlink(missing_ok=True)
            if not is_full(error):
                raise
            raise UserError(
                f"no room in {folder} for {count * width * 4 / 2**30:.1f} GiB of features",
                expected="as much free disk", fix="set MAE_BENCH_CACHE to a folder on a larger disk",
            ) from error  # fmt: skip
        part.replace(folder / name)


def _require_finite(features: torch.Tensor) -> None:
    """UserError where features (N, D) are not numbers: neighbours and few labels would make a score of them."""
    if strange := int((~features.isfinite().all(dim=1)).sum()):
        raise UserError(
            f"features of {strange} of {len(features)} images are not finite",
            expected="a backbone whose weights and activations are numbers in the precision",
            fix="use amp_dtype=float32, or look at the checkpoint: mae-bench inspect",
        )


def _fill(
    places: list[Path],
    model: FrozenFeatures,
    images: ImageSource,
    bad: BadImages,
    feed: Feed,
    progress: Progress,
    stage: str,
) -> None:
    """This process's share of the rows that are still missing in one of the sets, of `model.sets` in their order."""
    values = [np.load(place / "values.npy", mmap_mode="r+") for place in places]
    known = [np.load(place / "known.npy", mmap_mode="r+") for place in places]
    left = np.flatnonzero(~np.logical_and.reduce(known))
    gather_over_ranks(None)  # all have looked before anyone writes
    progress.stage(stage, len(left))
    done = 0
    for indices, _, imgs in feed.batches(Subset(images, left), bad):
        rows = left[indices.numpy()]
        found = feed.run(model, imgs).cpu()
        _require_finite(found)
        for array, mark, part in zip(values, known, found.split(model.widths, dim=1), strict=True):
            array[rows] = part.numpy()
            mark[rows] = True
        done += len(rows) * world().size
        progress.step(done)
    share_bad(bad)
    for array in (*values, *known):
        array.flush()


@dataclass(frozen=True)
class FrozenTask:
    """A protocol on cached features of one set: what it reads, and how it says what it found.

    seconds_features: until they were there, made now or read."""

    config: PooledConfig
    job: Job
    data: Data
    spec: BackboneSpec
    report: ConversionReport
    device: torch.device
    model: FrozenFeatures
    features: dict[str, SplitFeatures]
    seconds_features: float
    main_metric: str

    def outcome(
        self,
        metrics: dict[str, Metric],
        num_samples: int,
        seconds_eval: float,
        artefacts: dict[str, str] | None = None,
    ) -> Outcome:
        """The Outcome on the validation images."""
        found = outcome_of(
            metrics,
            num_samples,
            self.data.report,
            self.config,
            self.spec,
            self.report,
            self.job,
            seconds_eval,
            num_params(self.model),
            self.main_metric,
            notes=self.data.notes,
        )
        cost = found.cost | {"seconds_features": self.seconds_features}
        return replace(found, cost=cost, artefacts=found.artefacts | (artefacts or {}))


def feature_set(config: PooledConfig, spec: BackboneSpec) -> FeatureSet:
    """The last layer's features of the config's pooling."""
    return FeatureSet(cast(Pool, pooled_as_it_is(config, spec).global_pool))


def frozen_task(config: PooledConfig, job: Job, progress: Progress, main_metric: str = "top1") -> FrozenTask:
    """Checks the data, loads the backbone and brings its features of the config's pooling."""
    data = open_data(config)
    device = torch.device(job.device)
    vit, spec, report = load_at_size(config, job.backbone)
    model = FrozenFeatures(vit, spec, [feature_set(config, spec)]).to(device)
    began = time.monotonic()
    features = cached_features(model, data, config, spec, device, progress)
    return FrozenTask(
        config, job, data, spec, report, device, model, features, time.monotonic() - began, main_metric
    )
