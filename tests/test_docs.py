"""docs/checkpoints.md says what works: its list is read, its Python runs on toy weights; all pages' commands are understood."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from backbones.config import CheckpointConfig
from mae_bench.cli.app import app
from mae_bench.config import CONFIGS
from mae_bench.suite.rows import rows_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
IMAGENET = (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands() -> list[list[str]]:
    """Every `mae-bench` command of the pages and of the README's blocks, in words."""
    text = "\n".join([*blocks("sh"), *blocks("sh", IMAGENET), *blocks("bash", README)]).replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("mae-bench ")]
    assert len(found) > 15
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_understood(words: list[str]) -> None:
    """Subcommand and options exist; nothing is run."""
    command, rest = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    with command.make_context(words[1], rest) as context:
        chosen = context.params
    for task in (chosen.get("tasks") or "").split(","):
        assert not task or (CONFIGS / f"tasks/{task}.yaml").is_file(), task


def test_the_list_is_read(tmp_path: Path) -> None:
    (listed,) = blocks("yaml")
    (tmp_path / "list.yaml").write_text(listed)
    rows = rows_of([str(tmp_path / "list.yaml")])
    assert list(rows) == ["mae_vit_base", "dino-ours", "vit", "old_training_file"]
    assert [CheckpointConfig.model_validate(row).trust for row in rows.values()] == [
        False,
        False,
        False,
        True,
    ]


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0)
    save_file(model.state_dict(), "weights.safetensors")
    (code,) = [block for block in blocks("python") if "load_backbone" in block]
    exec(code, {"imgs": torch.zeros(2, 3, 48, 48)})
    assert (tmp_path / "ours" / "backbone.safetensors").is_file()


def test_the_unmasked_model_of_the_page_is_one(tmp_path: Path) -> None:
    from transformers import ViTMAEConfig, ViTMAEModel

    shape: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    ViTMAEModel(ViTMAEConfig(**shape, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    (code,) = [block for block in blocks("python") if "Unmasked" in block]
    there: dict[str, Any] = {}
    exec(code, there)
    assert there["Unmasked"](tmp_path).eval()(torch.zeros(2, 3, 32, 32)).last_hidden_state.shape == (
        2,
        17,
        48,
    )
