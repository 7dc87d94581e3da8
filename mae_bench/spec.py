"""BackboneSpec: the frozen description of a backbone that every later stage reads (standard library only)."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from mae_bench.errors import UserError

PosEmbed = Literal["sincos", "learned", "rope", "relative", "none"]
Pool = Literal["token", "avg"]
PosResample = Literal["bicubic", "bicubic_antialias", "bicubic_offset", "bilinear"]


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone is and how it must be fed; a weight carries it wherever it goes.

    Sizes are (height, width) in pixels. `mean` and `std` are per channel, for pixels in [0, 1].
    `global_pool` is the pooling that the weights were trained for or that their authors evaluate with.
    `num_prefix_tokens` counts the class token and any register tokens that stand before the patch tokens.
    `options` are further keywords of the architecture's class in timm, as JSON: layer scale, registers' positions, gated MLPs ...
    `pos_resample` is how the family takes its position table to other grids: bicubic, with antialiasing, by DINO's offset of
    0.1 in the scale factor, or bilinear.
    """

    arch: (
        str  # "vit", "beit", "eva", "sam" (timm's classes, built from the fields below) or a timm model name
    )
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
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet's training set
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    pretrain_method: str = "none"  # "mae", "supervised", "none" (random initialisation), ...
    pretrain_data: str = "none"
    pos_resample: PosResample = "bicubic"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(*self.img_size, *self.patch_size, self.in_chans, self.embed_dim, self.num_heads) < 1:
            raise UserError(
                f"img_size {self.img_size}, patch_size {self.patch_size}, in_chans {self.in_chans}, embed_dim {self.embed_dim}, "
                f"num_heads {self.num_heads}",
                expected="positive numbers",
            )
        if any(size % patch for size, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise UserError(
                f"img_size {self.img_size} is not divisible by patch_size {self.patch_size}",
                expected="a height and a width that are multiples of the patch's",
                fix=f"use img_size {tuple(-(-s // p) * p for s, p in zip(self.img_size, self.patch_size, strict=True))}",
            )
        if self.embed_dim % self.num_heads:
            raise UserError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if len(self.mean) != self.in_chans or len(self.std) != self.in_chans:
            raise UserError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, in_chans is {self.in_chans}",
                expected="one mean and one std a channel",
                fix="give mean and std of the data that the weights were trained on",
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches (down, across)."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: tuples become lists."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "BackboneSpec":
        """Reads `to_dict`'s result back; an unknown or missing field raises UserError."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise UserError(f"unknown fields in a BackboneSpec: {unknown}", expected=f"only {sorted(known)}")
        given: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
        }
        try:
            return cls(**given)
        except TypeError as error:
            raise UserError(f"an incomplete BackboneSpec: {error}") from error
