"""Configs of jobs that create a backbone without labels: MAE pretraining and random initialisation."""

from dataclasses import fields, replace
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from mae_bench.config import Config, NotIdentity, TrainConfig
from mae_bench.errors import UserError
from mae_bench.models.options import LossOn, MAEOptions, Sampling, TargetName
from mae_bench.spec import BackboneSpec


class ModelConfig(Config):
    """Shape of a plain ViT; sizes are (height, width), or one number for both."""

    img_size: tuple[PositiveInt, PositiveInt] = (224, 224)
    patch_size: tuple[PositiveInt, PositiveInt] = (16, 16)
    in_chans: PositiveInt = 3
    embed_dim: int = Field(gt=0, multiple_of=4, description="a multiple of 4, for the sine-cosine table")
    depth: PositiveInt
    num_heads: PositiveInt
    mlp_ratio: float = Field(4.0, gt=0)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @field_validator("img_size", "patch_size", mode="before")
    @classmethod
    def _is_square(cls, size: Any) -> Any:
        return (size, size) if isinstance(size, int) else size

    @model_validator(mode="after")
    def _describes_a_vit(self) -> "ModelConfig":
        try:
            self.spec(pretrain_method="none", pretrain_data="none")
        except UserError as error:
            raise ValueError(error.given) from error
        return self

    def spec(
        self, *, pretrain_method: str, pretrain_data: str, global_pool: Literal["token", "avg"] = "token"
    ) -> BackboneSpec:
        """Return the BackboneSpec of a ViT of this shape with a sine-cosine position table."""
        return BackboneSpec(
            arch="vit",
            **self.model_dump(),
            pos_embed="sincos",
            global_pool=global_pool,
            pretrain_method=pretrain_method,
            pretrain_data=pretrain_data,
        )


class PretrainConfig(TrainConfig):
    """MAE pretraining (arXiv 2111.06377, Table 8) with all axes of its ablations (Table 1, Figure 5)."""

    kind: Literal["pretrain"]
    model: ModelConfig
    decoder_embed_dim: int = Field(MAEOptions.decoder_embed_dim, gt=0, multiple_of=4)
    decoder_depth: int = Field(MAEOptions.decoder_depth, ge=1)
    decoder_num_heads: PositiveInt = MAEOptions.decoder_num_heads
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    mask_sampling: Sampling = MAEOptions.mask_sampling
    encoder_mask_tokens: bool = Field(
        MAEOptions.encoder_mask_tokens, description="let the encoder see mask tokens too (Table 1c)"
    )
    target: TargetName = MAEOptions.target
    norm_pix_loss: bool = Field(
        True, description="normalise the pixels of each patch; for the target 'pixels'"
    )
    num_pca: PositiveInt = Field(
        MAEOptions.num_pca, description="number of coefficients of the target 'pca' (Table 1d)"
    )
    tokenizer: str | None = Field(None, description="checkpoint of the tokenizer, for the target 'tokens'")
    loss_on: LossOn = MAEOptions.loss_on
    augment: Literal["none", "crop", "resized_crop"] = Field(
        "resized_crop", description="Table 1e; none is a centre crop without flip"
    )
    color_jitter: float = Field(
        0.0, ge=0, description="strength of brightness, contrast, saturation and hue (Table 1e)"
    )
    crop_scale: tuple[float, float] = (0.2, 1.0)
    decode: Literal["fast", "exact"] = Field(
        "fast", description="exact gives Pillow's pixels bit for bit; fast is within 0.05 of 255"
    )
    crop_on: NotIdentity[Literal["cpu", "device"]] = Field(
        "cpu", description="where crops are resampled and flipped"
    )
    betas: tuple[float, float] = (0.9, 0.95)
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="export averaged weights; the paper does not"
    )
    activation_checkpointing: NotIdentity[bool] = Field(
        MAEOptions.activation_checkpointing,
        description="recompute each block in the backward pass: less memory, more time",
    )
    num_reconstructions: NotIdentity[int] = Field(8, ge=1, description="number of validation images to draw")
    reconstruct_epochs: NotIdentity[float | None] = Field(
        None, gt=0, description="also draw them every so many epochs, not only at the end"
    )

    def mae_options(self) -> MAEOptions:
        """Return the options of the model; `num_tokens` keeps its default, as only the tokenizer knows it."""
        names = [field.name for field in fields(MAEOptions) if field.name in type(self).model_fields]
        options = MAEOptions(**{name: getattr(self, name) for name in names})
        return replace(options, norm_pix_loss=self.norm_pix_loss and self.target == "pixels")

    @model_validator(mode="after")
    def _decoder_divides(self) -> "PretrainConfig":
        if self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(
                f"decoder_embed_dim is not divisible by decoder_num_heads {self.decoder_num_heads}"
            )
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> "PretrainConfig":
        if (self.target == "tokens") != (self.tokenizer is not None):
            raise ValueError("the target 'tokens' needs tokenizer=PATH, and no other target does")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            scale = list(self.crop_scale)
            raise ValueError(
                f"crop_scale {scale}: smallest and largest share of the area, such as [0.2, 1.0]"
            )
        patch_values = self.model.patch_size[0] * self.model.patch_size[1] * self.model.in_chans
        if self.target == "pca" and self.num_pca > patch_values:
            raise ValueError(f"num_pca {self.num_pca} is more than the {patch_values} values of a patch")
        return self


class RandomConfig(Config):
    """A randomly initialised backbone: the lower bound of every comparison."""

    kind: Literal["random"]
    protocol: str = "random-init"
    model: ModelConfig
    global_pool: Literal["token", "avg"] = "token"


def describe_model(config: Any) -> tuple[BackboneSpec, list[str]]:
    """Return the spec of the ViT that a job with a `model` will make, about which nothing is assumed."""
    return config.model.spec(pretrain_method="unknown", pretrain_data="unknown"), []
