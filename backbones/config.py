"""Config of the job that brings a foreign checkpoint into a suite (imports no framework)."""

from typing import Any, Literal

from pydantic import Field, field_validator

from mae_bench.config import Config
from mae_bench.errors import UserError


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
    trust: bool = Field(False, description="removed; kept at false, so that no cell key changes")
    spec: dict[str, Any] = Field(
        {}, description="BackboneSpec fields that cannot be inferred from the file, e.g. num_heads"
    )

    @field_validator("trust")
    @classmethod
    def _is_never_run(cls, trust: bool) -> bool:
        if trust:
            raise UserError(
                "trust: true: no file's code is executed any more",
                expected="a file that can be read as data",
                fix="remove the key; if `mae-bench inspect` refuses the file, convert it in a container "
                "without network: docs/checkpoints.md, section Safe reading",
            )
        return trust
