"""Config of the job that brings a foreign checkpoint into a suite (imports no framework)."""

from typing import Any, Literal

from pydantic import Field

from mae_bench.config import Config


class CheckpointConfig(Config):
    """A checkpoint as a row of the comparison: read, verified and exported."""

    kind: Literal["checkpoint"]
    protocol: str = "checkpoint"
    source: str = Field(
        description="a path, file:PATH, run:DIR, timm:NAME, official:NAME or hf:REPO@REVISION"
    )
    format: str | None = Field(
        None, description="a format in backbones.translating.detect.FORMATS; by default it is detected"
    )
    weights: str | None = Field(
        None, description="which set of weights to read from a file with several: teacher, model_ema, ..."
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-fA-F]{64}$", description="expected digest of the weight file"
    )
    trust: bool = Field(
        False, description="unpickle what cannot be read as data, in a subprocess without network"
    )
    spec: dict[str, Any] = Field(
        {}, description="BackboneSpec fields that cannot be inferred from the file, e.g. num_heads"
    )
