"""Score a backbone's features on images without training: nearest neighbours, or retrieval of a second crop.

Shapes: N images, C channels, H W image, L tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mae_bench.data.batches.loader import Images, Transform, draw_epoch_order
from mae_bench.data.batches.transforms import build_eval_transform, build_train_transform, normalize
from mae_bench.data.sets.open import find_splits, open_images
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec

Values = tuple[float, ...]
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the weighted kNN classifier in facebookresearch/dino eval_knn.py
CROP_SCALE = (0.25, 1.0)  # area of the two crops per image
MIN_IMAGES = 16  # with fewer, every interval is wide
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
class Probe:
    """Images on which features are scored.

    views: one view of each image (N, C, H, W) if there are classes, else two random crops, as uint8.
    targets: the class of each image (N,), or None.
    """

    views: list[torch.Tensor]
    targets: torch.Tensor | None

    @property
    def measure(self) -> str:
        return RETRIEVAL if self.targets is None else KNN

    @property
    def num_images(self) -> int:
        return len(self.views[0])

    def score(
        self, model: nn.Module, spec: BackboneSpec, mean: Values, std: Values
    ) -> dict[tuple[str, bool], torch.Tensor]:
        """Return whether each image is right (N,), for each pooling, with and without the final norm."""
        pooled = [_compute_features(model, spec, imgs, mean, std) for imgs in self.views]
        right = {}
        for key in pooled[0]:
            features = [F.normalize(view[key], dim=-1) for view in pooled]
            right[key] = _retrieve(*features) if self.targets is None else _knn(features[0], self.targets)
        return right


def build_probe(spec: BackboneSpec, sample: Sample) -> Probe:
    """Load the views of a sample.

    Raise UserError for fewer than `MIN_IMAGES` images, and for a backbone whose input is not RGB.
    """
    if spec.in_chans != 3:
        raise UserError(
            f"a backbone that takes {spec.in_chans} channels", expected="3: images are read as RGB"
        )
    targets = sample.targets
    if targets is None:
        transform = build_train_transform(spec.img_size, CROP_SCALE, spec.interpolation)
        views = [sample.load_view(transform, number)[0] for number in range(2)]
    else:
        imgs, positions = sample.load_view(
            build_eval_transform(spec.img_size, interpolation=spec.interpolation)
        )
        views, targets = [imgs], targets[positions]
    check_num_images(len(views[0]))
    return Probe(views, targets)


def check_num_images(number: int) -> None:
    """Raise UserError for fewer than `MIN_IMAGES` images."""
    if number < MIN_IMAGES:
        raise UserError(f"{number} decodable images", expected=f"at least {MIN_IMAGES}")


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
