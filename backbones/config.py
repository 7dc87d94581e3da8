"""Config of the job that brings a foreign checkpoint into a suite (imports no framework)."""

from typing import Any, Literal

from pydantic import Field

from mae_bench.config import Config


class CheckpointConfig(Config):
    """A checkpoint as a row of the comparison: read, verified, exported."""

    kind: Literal["checkpoint"]
    protocol: str = "checkpoint"
    source: str = Field(
        description="a path, file:PATH, run:DIR, timm:NAME, official:NAME or hf:REPO@REVISION"
    )
    format: str | None = Field(
        None, description="a name of backbones.translating.detect.FORMATS, where the file alone cannot decide"
    )
    weights: str | None = Field(
        None, description="which set of weights, where a file holds several: teacher, model_ema ..."
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-fA-F]{64}$", description="digest of the weight file, which must match"
    )
    trust: bool = Field(
        False, description="unpickle what cannot be read as data, in a subprocess without network"
    )
    spec: dict[str, Any] = Field(
        {}, description="fields of the BackboneSpec that the file does not tell, e.g. num_heads"
    )
