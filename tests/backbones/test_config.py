"""The config of a checkpoint: a removed option is explained, and no cell key changes with it."""

from typing import Any

import pytest

from backbones.config import CheckpointConfig
from mae_bench.config import build
from mae_bench.errors import UserError
from mae_bench.files import json_digest

SOURCE: dict[str, Any] = {"kind": "checkpoint", "source": "a.pth"}


def test_the_removed_option_is_explained():
    with pytest.raises(UserError, match="executed") as error:
        build(CheckpointConfig, SOURCE | {"trust": True}, "backbones.a")
    assert "container without network" in error.value.fix


def test_files_that_never_used_it_keep_their_digest():
    """The complete config is what cell keys and records are digested from; computed before the removal."""
    config = build(CheckpointConfig, SOURCE, "x").model_dump()
    assert build(CheckpointConfig, SOURCE | {"trust": False}, "x").model_dump() == config
    assert json_digest(config) == "322bb77cada59b0a44fae8e4e4a1082743d6ed643ac088cc5af7af2bb616eb4c"
