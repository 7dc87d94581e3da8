"""Suggests how weights of unknown feeding want their images: mean and std, pooling and final norm, tried on the user's images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from backbones.load import load_backbone
from mae_bench.data.batches.loader import Images, Transform, epoch_order
from mae_bench.data.batches.transforms import eval_transform, normalize, train_transform
from mae_bench.data.sets.open import find_splits, open_images
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import UserError
from mae_bench.intervals import paired_interval
from mae_bench.spec import BackboneSpec

Values = tuple[float, ...]
Key = tuple[str, str, bool]  # normalisation, pooling, whether with the final norm
NORMALISATIONS: dict[str, tuple[Values, Values]] = {  # mean and std of pixels in [0, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision; timm's IMAGENET_DEFAULT
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # pixels in [-1, 1]; timm's IMAGENET_INCEPTION
    "clip": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),  # openai/CLIP clip/clip.py
    "[0, 1]": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the weighted kNN classifier in facebookresearch/dino eval_knn.py
CROP_SCALE = (0.25, 1.0)  # of the two crops that are to find each other
FEWEST, MOST = 16, 256  # images: with fewer every interval is wide, with more it takes long
BATCH = 32
KNN, RETRIEVAL = "leave-one-out kNN accuracy", "share of crops that find the other crop of their image"


@dataclass(frozen=True)
class Sample:
    """Some images of a set, by their indices."""

    images: ImageSource
    indices: list[int]

    @property
    def targets(self) -> torch.Tensor | None:
        """The class of each, None where there are no classes to tell apart."""
        found = torch.tensor([int(self.images.targets[i]) for i in self.indices])
        return found if len(found.unique()) > 1 else None

    def view(self, transform: Transform, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """A view (N, C, H, W) of each image that decodes, drawn anew for each number, and which of the sample these are (N,)."""
        batch = Images(self.images, transform, 0, replace_bad=False).__getitems__(
            [(number, i, 0) for i in self.indices]
        )
        if isinstance(batch, UserError):
            raise batch
        if not len(batch.indices):
            raise UserError(
                f"none of {len(self.indices)} images decodes: {batch.bad[0][0]}: {batch.bad[0][1]}",
                expected="images",
            )
        return batch.imgs, torch.tensor([self.indices.index(int(i)) for i in batch.indices])


def a_sample(folder: str | Path, most: int, seed: int = 0) -> Sample:
    """At most `most` images of a set, drawn without regard to their order; of its validation split where it has one."""
    splits = find_splits(folder) or ["train"]
    images = open_images(folder, splits[-1])
    return Sample(images, sorted(epoch_order(len(images), seed, 0)[:most].tolist()))


@dataclass(frozen=True)
class Candidate:
    """A way to feed and to pool. norm: whether the final norm stands before (or, trained so, behind) the pooling, or is left out.

    score: share of images that were right. behind: how much less than the best one, with a 95 % interval, image by image.
    """

    normalisation: str
    mean: Values
    std: Values
    global_pool: str
    norm: bool
    score: float
    behind: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @property
    def ties(self) -> bool:
        """Whether the images cannot tell it from the best one."""
        return self.low <= 0

    def overrides(self) -> str:
        """As the command line takes it."""
        mean, std = (",".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"'mean=[{mean}]' 'std=[{std}]' global_pool={self.global_pool}"


@dataclass(frozen=True)
class Suggestion:
    """Candidates, the best first. A suggestion: nothing that is loaded anywhere follows from it.

    present: how the checkpoint is fed and pooled when nobody says otherwise, one of the candidates.
    """

    measure: str
    images: int
    candidates: list[Candidate]
    present: Candidate

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def clear(self) -> bool:
        """Whether the best one is better than every other of another normalisation or pooling, beyond its interval."""
        same = (self.best.normalisation, self.best.global_pool)
        return not any(c.ties for c in self.candidates[1:] if (c.normalisation, c.global_pool) != same)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"clear": self.clear, "applied": False, "overrides": self.best.overrides()}


def suggest(source: str | Path, folder: str | Path, *, most: int = MOST, **options: Any) -> Suggestion:
    """Tries the candidates on at most `most` images of `folder` with the backbone of `source` (options: of `load_backbone`).

    UserError for too few images, and for a backbone of other channels than RGB.
    """
    model, spec, _ = load_backbone(source, **options)
    if spec.in_chans != 3:
        raise UserError(
            f"{source} takes {spec.in_chans} channels",
            expected="RGB: the candidates are normalisations of it",
        )
    sample = a_sample(folder, most)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return try_candidates(model.eval().to(device), spec, sample)


def try_candidates(model: nn.Module, spec: BackboneSpec, sample: Sample) -> Suggestion:
    """Scores each candidate on the sample: by the classes of its images, or, without classes, by two crops of each image."""
    targets = sample.targets
    if targets is None:
        transform = train_transform(spec.img_size, CROP_SCALE, spec.interpolation)
        views = [sample.view(transform, number)[0] for number in range(2)]
    else:
        imgs, which = sample.view(eval_transform(spec.img_size, interpolation=spec.interpolation))
        views, targets = [imgs], targets[which]
    if len(views[0]) < FEWEST:
        raise UserError(f"{len(views[0])} images that decode", expected=f"at least {FEWEST}")
    right: dict[Key, torch.Tensor] = {}
    pairs = _pairs(spec)
    for name, (mean, std) in pairs.items():
        pooled = [_pooled(model, spec, imgs, mean, std) for imgs in views]
        for pool, norm in pooled[0]:
            features = [F.normalize(view[pool, norm], dim=-1) for view in pooled]
            right[name, pool, norm] = _retrieved(*features) if targets is None else _knn(features[0], targets)
    pool = spec.global_pool if spec.num_prefix_tokens else "avg"
    present = next(
        key for key in right if key[:2] == (next(iter(pairs)), pool)
    )  # what is tried first has the final norm
    rows = _ranked(right, pairs, present)
    shown = next(row for row in rows if (row.normalisation, row.global_pool, row.norm) == present)
    return Suggestion(RETRIEVAL if targets is None else KNN, len(views[0]), rows, shown)


def _pairs(spec: BackboneSpec) -> dict[str, tuple[Values, Values]]:
    """Normalisations by name, that of the spec first."""
    own = next(
        (name for name, pair in NORMALISATIONS.items() if pair == (spec.mean, spec.std)), "the checkpoint's"
    )
    return {own: (spec.mean, spec.std)} | NORMALISATIONS


@torch.no_grad()
def _pooled(
    model: nn.Module, spec: BackboneSpec, imgs: torch.Tensor, mean: Values, std: Values
) -> dict[tuple[str, bool], torch.Tensor]:
    """(N, D) for each pooling, with and without the final norm; without alone where the weights have none."""
    found: dict[tuple[str, bool], list[torch.Tensor]] = {}
    device = next(iter(model.parameters()), imgs).device
    with _without_norm(model) as (norm, fc_norm):
        for part in imgs.split(BATCH):
            tokens = model.forward_features(normalize(part.to(device), mean, std))  # type: ignore[operator]
            for pool, with_norm, pooled in _poolings(tokens, spec.num_prefix_tokens, norm, fc_norm):
                found.setdefault((pool, with_norm), []).append(pooled.float().cpu())
    return {key: torch.cat(parts) for key, parts in found.items()}


def _poolings(
    tokens: torch.Tensor, prefix: int, norm: nn.Module, fc_norm: nn.Module
) -> Iterator[tuple[str, bool, torch.Tensor]]:
    """Pooling, with the final norm or not, features (N, D); the spec's own reading first."""
    has_norm = not (isinstance(norm, nn.Identity) and isinstance(fc_norm, nn.Identity))
    for with_norm in (True, False) if has_norm else (False,):
        x = norm(tokens) if with_norm else tokens
        pooled = ({"token": x[:, 0]} if prefix else {}) | {"avg": x[:, prefix:].mean(dim=1)}
        for pool, features in pooled.items():
            yield pool, with_norm, fc_norm(features) if with_norm else features


@contextmanager
def _without_norm(model: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Takes the final norm out of a model for a while, and gives it: as `norm` stands before the pooling, `fc_norm` behind it."""
    norm = getattr(model, "norm", nn.Identity())
    model.norm = nn.Identity()
    try:
        yield norm, getattr(model, "fc_norm", nn.Identity())
    finally:
        model.norm = norm


def _knn(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N,) whether the nearest others, weighted by exp(cosine / temperature), vote for the image's own class."""
    similarity = (features @ features.T).fill_diagonal_(-torch.inf)
    near, who = similarity.topk(min(NEIGHBOURS, len(features) - 1), dim=1)
    votes = torch.zeros(len(features), int(targets.max()) + 1).scatter_add_(
        1, targets[who], (near / TEMPERATURE).exp()
    )
    return votes.argmax(dim=1) == targets


def _retrieved(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(N,) whether the most similar second crop is of the same image."""
    return (first @ second.T).argmax(dim=1) == torch.arange(len(first))


def _ranked(
    right: dict[Key, torch.Tensor], pairs: dict[str, tuple[Values, Values]], present: Key
) -> list[Candidate]:
    """The candidates by score; among equals the present reading goes first, then the order in which they were tried."""
    order = sorted(right, key=lambda key: (-int(right[key].sum()), key != present))
    best = right[order[0]].float()
    rows = []
    for name, pool, norm in order:
        here = right[name, pool, norm].float()
        low, high = paired_interval(best.tolist(), here.tolist())
        rows.append(
            Candidate(
                name, *pairs[name], pool, norm, float(here.mean()), float((best - here).mean()), low, high
            )
        )
    return rows


def render(suggestion: Suggestion) -> RenderableType:
    """A row a candidate, and what follows from them and what does not."""
    table = Table(box=None, header_style="bold")
    for name in ("mean and std", "pooling", "final norm"):
        table.add_column(name)
    for name in ("right", "behind the best (95 %)"):
        table.add_column(name, justify="right")
    for row in suggestion.candidates:
        name = row.normalisation + (" (as it is read now)" if row == suggestion.present else "")
        behind = "" if row == suggestion.best else f"{row.behind:.1%} ({row.low:.1%} to {row.high:.1%})"
        table.add_row(Text(name), row.global_pool, "yes" if row.norm else "no", f"{row.score:.1%}", behind)
    return Group(
        Text(f"{suggestion.measure}, {suggestion.images} images", style="bold"),
        table,
        Text(verdict(suggestion)),
    )


def verdict(suggestion: Suggestion) -> str:
    """Two sentences for a person."""
    best, present = suggestion.best, suggestion.present
    if present.ties:
        said = "These images do not tell the present reading from the best one: leave it as it is, or try more images."
    else:
        how = "is clearly the best" if suggestion.clear else "is among the best"
        said = f"{best.normalisation}, {best.global_pool} {how}; the present reading is {present.behind:.1%} behind."
        said += f" To read it so: {best.overrides()}"
    return f"{said}\nA suggestion from {suggestion.images} images; nothing was applied."
