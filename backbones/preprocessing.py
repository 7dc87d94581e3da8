"""Suggest mean, std, pooling and final norm for weights that do not state them, by trying them on images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from backbones.load import ReadOptions, load_backbone
from mae_bench.data.batches.loader import Images, Transform, draw_epoch_order
from mae_bench.data.batches.transforms import build_eval_transform, build_train_transform, normalize
from mae_bench.data.sets.open import find_splits, open_images
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import UserError
from mae_bench.intervals import paired_interval
from mae_bench.spec import BackboneSpec

# Shapes: N images, C channels, H W image, L tokens, D width.
Values = tuple[float, ...]
Key = tuple[str, str, bool]  # normalisation, pooling, whether the final norm is applied
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP clip/clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NORMALISATIONS: dict[str, tuple[Values, Values]] = {  # mean and std of pixels in [0, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision; timm's IMAGENET_DEFAULT
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # pixels in [-1, 1]; timm's IMAGENET_INCEPTION
    "clip": (CLIP_MEAN, CLIP_STD),
    "[0, 1]": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the weighted kNN classifier in facebookresearch/dino eval_knn.py
CROP_SCALE = (0.25, 1.0)  # area of the two crops per image
MIN_IMAGES = 16  # with fewer, every interval is wide
MAX_IMAGES = 256  # with more, trying all candidates takes long
BATCH_SIZE = 32
KNN, RETRIEVAL = "leave-one-out kNN accuracy", "share of crops that retrieve the other crop of their image"


@dataclass(frozen=True)
class Sample:
    """Some images of a set, by index."""

    images: ImageSource
    indices: list[int]

    @property
    def targets(self) -> torch.Tensor | None:
        """The class of each image (N,), or None if there are fewer than two classes."""
        found = torch.tensor([int(self.images.targets[i]) for i in self.indices])
        return found if len(set(found.tolist())) > 1 else None

    def load_view(self, transform: Transform, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one view of each decodable image (N, C, H, W) and its position in the sample (N,).

        Each `number` draws new random crops. Raises UserError if no image can be decoded.
        """
        loader = Images(self.images, transform, 0, replace_bad=False)
        batch = loader.__getitems__([(number, i, 0) for i in self.indices])
        if isinstance(batch, UserError):
            raise batch
        if not len(batch.indices):
            path, reason = batch.bad[0][:2]
            raise UserError(
                f"none of {len(self.indices)} images can be decoded: {path}: {reason}", expected="images"
            )
        return batch.imgs, torch.tensor([self.indices.index(int(i)) for i in batch.indices])


def draw_sample(folder: str | Path, max_images: int, seed: int = 0) -> Sample:
    """Draw at most `max_images` images at random, from the validation split if the set has one."""
    splits = find_splits(folder) or ["train"]
    images = open_images(folder, splits[-1])
    return Sample(images, sorted(draw_epoch_order(len(images), seed, 0)[:max_images].tolist()))


@dataclass(frozen=True)
class Candidate:
    """One way to preprocess images and pool tokens, with its score.

    norm: whether the final norm is applied, before the pooling or (if trained so) after it.
    score: share of images that are right. behind: difference to the best candidate, paired per image; low,
    high: its 95 % interval.
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
        """Whether the interval includes the best candidate."""
        return self.low <= 0

    def overrides(self) -> str:
        """Return the spec fields as the command line takes them."""
        mean, std = (",".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"'mean=[{mean}]' 'std=[{std}]' global_pool={self.global_pool}"


@dataclass(frozen=True)
class Suggestion:
    """Candidates, best first. It is only reported, never applied.

    present: the candidate that matches the spec as the checkpoint is loaded now.
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
        """Whether the best candidate beats every other normalisation and pooling beyond the interval."""
        same = (self.best.normalisation, self.best.global_pool)
        others = [row for row in self.candidates[1:] if (row.normalisation, row.global_pool) != same]
        return not any(row.ties for row in others)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self) | {"clear": self.clear, "applied": False, "overrides": self.best.overrides()}


def suggest_preprocessing(
    source: str | Path, folder: str | Path, *, max_images: int = MAX_IMAGES, **options: Unpack[ReadOptions]
) -> Suggestion:
    """Score the candidates with the backbone of `source` on at most `max_images` images of `folder`.

    options: `backbones.load.ReadOptions`. Raises UserError for fewer than `MIN_IMAGES` images, and for a
    backbone whose input is not RGB.
    """
    model, spec, _ = load_backbone(source, **options)
    if spec.in_chans != 3:
        raise UserError(
            f"{source} takes {spec.in_chans} channels",
            expected="3 channels: the candidates are normalisations of RGB",
        )
    sample = draw_sample(folder, max_images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return score_candidates(model.to(device), spec, sample)


def score_candidates(model: nn.Module, spec: BackboneSpec, sample: Sample) -> Suggestion:
    """Score each candidate by kNN accuracy or, without classes, by retrieval of the other crop."""
    # 1. Load one view of each image if there are classes, else two random crops.
    targets = sample.targets
    if targets is None:
        transform = build_train_transform(spec.img_size, CROP_SCALE, spec.interpolation)
        views = [sample.load_view(transform, number)[0] for number in range(2)]
    else:
        imgs, positions = sample.load_view(
            build_eval_transform(spec.img_size, interpolation=spec.interpolation)
        )
        views, targets = [imgs], targets[positions]
    if len(views[0]) < MIN_IMAGES:
        raise UserError(f"{len(views[0])} decodable images", expected=f"at least {MIN_IMAGES}")

    # 2. Score every normalisation, pooling and use of the final norm.
    right: dict[Key, torch.Tensor] = {}
    normalisations = _list_normalisations(spec)
    for name, (mean, std) in normalisations.items():
        pooled = [_compute_features(model, spec, imgs, mean, std) for imgs in views]
        for pool, norm in pooled[0]:
            features = [F.normalize(view[pool, norm], dim=-1) for view in pooled]
            right[name, pool, norm] = _retrieve(*features) if targets is None else _knn(features[0], targets)

    # 3. Rank them against the current reading: the spec's own normalisation and pooling, with the final norm
    # (tried first).
    own = next(iter(normalisations))
    pool = spec.global_pool if spec.num_prefix_tokens else "avg"
    present = next(key for key in right if key[:2] == (own, pool))
    rows = _rank(right, normalisations, present)
    current = next(row for row in rows if (row.normalisation, row.global_pool, row.norm) == present)
    return Suggestion(RETRIEVAL if targets is None else KNN, len(views[0]), rows, current)


def _list_normalisations(spec: BackboneSpec) -> dict[str, tuple[Values, Values]]:
    """Return mean and std by name, those of the spec first."""
    own = (spec.mean, spec.std)
    name = next((name for name, pair in NORMALISATIONS.items() if pair == own), "the checkpoint's")
    return {name: own} | NORMALISATIONS


@torch.no_grad()
def _compute_features(
    model: nn.Module, spec: BackboneSpec, imgs: torch.Tensor, mean: Values, std: Values
) -> dict[tuple[str, bool], torch.Tensor]:
    """Map uint8 images (N, C, H, W) to features (N, D) for each pooling, with and without the final norm."""
    found: dict[tuple[str, bool], list[torch.Tensor]] = {}
    device = next(iter(model.parameters()), imgs).device
    with _without_norm(model) as (norm, fc_norm):
        for start in range(0, len(imgs), BATCH_SIZE):
            batch = imgs[start : start + BATCH_SIZE].to(device)
            tokens = model.forward_features(normalize(batch, mean, std))  # type: ignore[operator]
            for pool, with_norm, pooled in _pool(tokens, spec.num_prefix_tokens, norm, fc_norm):
                found.setdefault((pool, with_norm), []).append(pooled.float().cpu())
    return {key: torch.cat(parts) for key, parts in found.items()}


def _pool(
    tokens: torch.Tensor, num_prefix_tokens: int, norm: nn.Module, fc_norm: nn.Module
) -> Iterator[tuple[str, bool, torch.Tensor]]:
    """Yield (pooling, whether the final norm is applied, features (N, D)) of tokens (N, L, D)."""
    has_norm = not (isinstance(norm, nn.Identity) and isinstance(fc_norm, nn.Identity))
    for with_norm in (True, False) if has_norm else (False,):
        x = norm(tokens) if with_norm else tokens
        pooled = {"token": x[:, 0]} if num_prefix_tokens else {}
        pooled["avg"] = x[:, num_prefix_tokens:].mean(dim=1)
        for pool, features in pooled.items():
            yield pool, with_norm, fc_norm(features) if with_norm else features


@contextmanager
def _without_norm(model: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Remove the final norm inside the block; yield `norm` (before pooling) and `fc_norm` (after it)."""
    norm = getattr(model, "norm", nn.Identity())
    model.norm = nn.Identity()
    try:
        yield norm, getattr(model, "fc_norm", nn.Identity())
    finally:
        model.norm = norm


def _knn(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return (N,) whether neighbours weighted by exp(cosine / temperature) vote for an image's class."""
    similarity = (features @ features.T).fill_diagonal_(-torch.inf)
    values, neighbours = similarity.topk(min(NEIGHBOURS, len(features) - 1), dim=1)
    votes = torch.zeros(len(features), int(targets.max()) + 1)
    votes.scatter_add_(1, targets[neighbours], (values / TEMPERATURE).exp())
    return votes.argmax(dim=1) == targets


def _retrieve(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return (N,) whether the most similar second crop comes from the same image."""
    return (first @ second.T).argmax(dim=1) == torch.arange(len(first))


def _rank(
    right: dict[Key, torch.Tensor], normalisations: dict[str, tuple[Values, Values]], present: Key
) -> list[Candidate]:
    """Return the candidates by score; among ties the current reading comes first, then the order of trial."""
    order = sorted(right, key=lambda key: (-int(right[key].sum()), key != present))
    best = right[order[0]].float()
    rows = []
    for name, pool, norm in order:
        this = right[name, pool, norm].float()
        low, high = paired_interval(best.tolist(), this.tolist())
        score, behind = float(this.mean()), float((best - this).mean())
        rows.append(Candidate(name, *normalisations[name], pool, norm, score, behind, low, high))
    return rows


def render(suggestion: Suggestion) -> RenderableType:
    """Render one row per candidate, and the verdict."""
    table = Table(box=None, header_style="bold")
    for name in ("mean and std", "pooling", "final norm"):
        table.add_column(name)
    for name in ("score", "behind the best (95 %)"):
        table.add_column(name, justify="right")
    for row in suggestion.candidates:
        name = row.normalisation + (" (current)" if row == suggestion.present else "")
        behind = "" if row == suggestion.best else f"{row.behind:.1%} ({row.low:.1%} to {row.high:.1%})"
        table.add_row(Text(name), row.global_pool, "yes" if row.norm else "no", f"{row.score:.1%}", behind)
    title = Text(f"{suggestion.measure}, {suggestion.images} images", style="bold")
    return Group(title, table, Text(verdict(suggestion)))


def verdict(suggestion: Suggestion) -> str:
    """State how the current preprocessing compares with the best candidate, and that nothing was applied."""
    best, present = suggestion.best, suggestion.present
    if present.ties:
        found = (
            "These images cannot separate the current preprocessing from the best candidate: "
            "keep it, or try more images."
        )
    else:
        how = "is clearly the best" if suggestion.clear else "is among the best"
        found = (
            f"{best.normalisation}, {best.global_pool} {how}; "
            f"the current preprocessing is {present.behind:.1%} behind. To use it, give: {best.overrides()}"
        )
    return f"{found}\nThis is a suggestion from {suggestion.images} images; nothing was applied."
