"""Configs of the jobs that make a backbone without labels: MAE pretraining and the random floor."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from mae_bench.config import Config, TrainConfig
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec


class ModelConfig(Config):
    """The shape of a plain ViT; sizes are one number or (height, width)."""

    img_size: tuple[PositiveInt, PositiveInt] = (224, 224)
    patch_size: tuple[PositiveInt, PositiveInt] = (16, 16)
    in_chans: PositiveInt = 3
    embed_dim: int = Field(gt=0, multiple_of=4, description="a multiple of 4, for the sine-cosine table")
    depth: PositiveInt
    num_heads: PositiveInt
    mlp_ratio: float = Field(4.0, gt=0)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _describes_a_vit(self) -> "ModelConfig":
        try:
            self.spec(pretrain_method="none", pretrain_data="none")
        except UserError as error:
            raise ValueError(error.given) from error
        return self

    def spec(self, *, pretrain_method: str, pretrain_data: str, global_pool: Literal["token", "avg"] = "token") -> BackboneSpec:
        """The BackboneSpec of a ViT of this shape with a sine-cosine table."""
        return BackboneSpec(
            arch="vit",
            **self.model_dump(),
            pos_embed="sincos",
            global_pool=global_pool,
            pretrain_method=pretrain_method,
            pretrain_data=pretrain_data,
        )


class PretrainConfig(TrainConfig):
    """MAE pretraining (arXiv 2111.06377, Table 8)."""

    kind: Literal["pretrain"]
    model: ModelConfig
    decoder_embed_dim: int = Field(512, gt=0, multiple_of=4)
    decoder_depth: int = Field(8, ge=1)
    decoder_num_heads: PositiveInt = 16
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    norm_pix_loss: bool = True
    crop_scale: tuple[float, float] = (0.2, 1.0)
    betas: tuple[float, float] = (0.9, 0.95)
    num_reconstructions: int = Field(8, ge=1, description="validation images drawn at the end")

    @model_validator(mode="after")
    def _decoder_divides(self) -> "PretrainConfig":
        if self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(f"decoder_embed_dim is not divisible by decoder_num_heads {self.decoder_num_heads}")
        return self


class RandomConfig(Config):
    """A backbone at its random initialisation: the floor of every comparison."""

    kind: Literal["random"]
    protocol: str = "random-init"
    model: ModelConfig
    global_pool: Literal["token", "avg"] = "token"
