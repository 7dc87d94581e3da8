"""BackboneSpec, the frozen description of a backbone that every later stage reads (standard library only)."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from mae_bench.errors import UserError

PosEmbed = Literal["sincos", "learned", "rope", "relative", "none"]
Pool = Literal["token", "avg"]
PosResample = Literal["bicubic", "bicubic_antialias", "bicubic_offset", "bilinear", "bilinear_antialias"]


@dataclass(frozen=True)
class BackboneSpec:
    """Architecture and preprocessing of a backbone; it travels with the weights.

    Attributes:
        arch: "vit", "beit", "eva" or "sam" (timm classes built from the fields below), or the name of a timm
            model.
        img_size, patch_size: (height, width) in pixels.
        num_prefix_tokens: number of class and register tokens in front of the patch tokens.
        global_pool: the pooling that the weights were trained with, or that their authors evaluate with.
        mean, std: per channel, for pixels in [0, 1]; by default those of ImageNet's training set.
        pretrain_method: "mae", "supervised", "none" (random initialisation), ...
        pos_resample: how the model family resamples its position table to another grid: bicubic or bilinear,
            with or without antialiasing, or bicubic with DINO's offset of 0.1 in the scale factor.
        options: further keyword arguments of the timm class, as JSON: layer scale, register positions, gated
            MLPs, ...
    """

    arch: str
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_prefix_tokens: int = 1
    pos_embed: PosEmbed = "learned"
    norm_eps: float = 1e-6
    global_pool: Pool = "token"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    pretrain_method: str = "none"
    pretrain_data: str = "none"
    pos_resample: PosResample = "bicubic"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(*self.img_size, *self.patch_size, self.in_chans, self.embed_dim, self.num_heads) < 1:
            raise UserError(
                f"img_size {self.img_size}, patch_size {self.patch_size}, in_chans {self.in_chans}, "
                f"embed_dim {self.embed_dim}, num_heads {self.num_heads}",
                expected="positive numbers",
            )
        if any(size % patch for size, patch in zip(self.img_size, self.patch_size, strict=True)):
            (height, width), (h, w) = self.img_size, self.patch_size
            divisible = -(-height // h) * h, -(-width // w) * w  # rounded up
            raise UserError(
                f"img_size {self.img_size} is not divisible by patch_size {self.patch_size}",
                expected="a height and a width that are multiples of the patch size",
                fix=f"use img_size {divisible}",
            )
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}",
                expected="a number of heads that divides the width",
            )
        if len(self.mean) != self.in_chans or len(self.std) != self.in_chans:
            raise UserError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, in_chans is {self.in_chans}",
                expected="one mean and one std per channel",
                fix="give the mean and std of the data that the weights were trained on",
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of patches (vertically, horizontally)."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types: tuples become lists."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "BackboneSpec":
        """Read the result of `to_dict`. Raise UserError for an unknown or a missing field."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise UserError(f"unknown fields in a BackboneSpec: {unknown}", expected=f"only {sorted(known)}")
        given: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
        }
        try:
            return cls(**given)
        except TypeError as error:
            raise UserError(f"an incomplete BackboneSpec: {error}") from error
