"""Suggest mean, std, pooling and final norm for weights that do not state them, by trying them on images."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from backbones.load import ReadOptions, load_backbone
from backbones.probe import Probe, Values, build_probe, draw_sample
from mae_bench.intervals import paired_interval
from mae_bench.spec import BackboneSpec

Key = tuple[str, str, bool]  # normalisation, pooling, whether the final norm is applied
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP clip/clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NORMALISATIONS: dict[str, tuple[Values, Values]] = {  # mean and std of pixels in [0, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision; timm's IMAGENET_DEFAULT
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # pixels in [-1, 1]; timm's IMAGENET_INCEPTION
    "clip": (CLIP_MEAN, CLIP_STD),
    "[0, 1]": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
MAX_IMAGES = 256  # with more, trying all candidates takes long


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
    probe = build_probe(spec, draw_sample(folder, max_images))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return score_candidates(model.to(device), spec, probe)


def score_candidates(model: nn.Module, spec: BackboneSpec, probe: Probe) -> Suggestion:
    """Score each candidate by kNN accuracy or, without classes, by retrieval of the other crop."""
    # 1. Score every normalisation, pooling and use of the final norm.
    right: dict[Key, torch.Tensor] = {}
    normalisations = _list_normalisations(spec)
    for name, (mean, std) in normalisations.items():
        for (pool, norm), found in probe.score(model, spec, mean, std).items():
            right[name, pool, norm] = found

    # 2. Rank them against the current reading: the spec's own normalisation and pooling, with the final norm
    # (tried first).
    own = next(iter(normalisations))
    pool = spec.global_pool if spec.num_prefix_tokens else "avg"
    present = next(key for key in right if key[:2] == (own, pool))
    rows = _rank(right, normalisations, present)
    current = next(row for row in rows if (row.normalisation, row.global_pool, row.norm) == present)
    return Suggestion(probe.measure, probe.num_images, rows, current)


def _list_normalisations(spec: BackboneSpec) -> dict[str, tuple[Values, Values]]:
    """Return mean and std by name, those of the spec first."""
    own = (spec.mean, spec.std)
    name = next((name for name, pair in NORMALISATIONS.items() if pair == own), "the checkpoint's")
    return {name: own} | NORMALISATIONS


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
