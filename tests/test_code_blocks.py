"""Every code block of README and docs is tagged, and the blocks tagged `run` and `plan` work as written.

The info string of a fence is its language and one tag:
`run`       the block is executed in a folder with toy data at PATH and toy checkpoints (a YAML block is
            written to the file that its first comment names);
`plan`      each mae-bench command is executed with --dry-run, and launchers (torchrun, srun) are left out;
`needs: X`  the block needs X and is not executed, but its mae-bench commands are parsed.
A block in the language `text` shows output and has no tag.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from mae_bench.cli.app import app
from mae_bench.data.demo.demo import DemoConfig, DemoSet, make_demo_data
from mae_bench.models.pos_embed import sincos_2d

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TAG = re.compile(r"(bash|python|yaml) (run|plan|needs: .+)")
LAUNCHER = re.compile(r"^(?:torchrun|srun)\b.*?-m mae_bench ")
STARTS_CELLS = ("demo", "run", "pretrain", "evaluate")  # the commands that take --dry-run
SMALL = DemoSet(img_size=64, num_train=24, num_val=20)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line it begins at, its language, its tag and its text."""

    page: Path
    line: int
    language: str
    tag: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in FENCE.finditer(text):
        language, _, tag = found[1].partition(" ")
        blocks.append(Block(page, text.count("\n", 0, found.start()) + 1, language, tag, found[2]))
    return blocks


def list_untagged(blocks: list[Block]) -> list[str]:
    return [
        f"{block.place}: {block.language} {block.tag}".strip()
        for block in blocks
        if block.language != "text" and not TAG.fullmatch(f"{block.language} {block.tag}")
    ]


def list_commands(block: Block) -> list[list[str]]:
    """Return the words of each mae-bench command of a bash block, without a launcher before it."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(LAUNCHER.sub("mae-bench ", line.strip()), comments=True)
        if words[:1] == ["mae-bench"]:
            commands.append(words)
    return commands


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the pages name: data at PATH, checkpoints, a photograph, a user's code."""
    folder = tmp_path_factory.mktemp("toys")
    make_demo_data(folder / "PATH", DemoConfig(imagenet=SMALL, coco=SMALL, ade20k=SMALL))
    for name in ("imagenet_small", "tiny_imagenet100", "inat2018"):
        (folder / "PATH" / name).symlink_to("imagenet")
    (folder / "PATH" / "coco_small").symlink_to("coco")
    (folder / "PATH" / "ade20k_small").symlink_to("ade20k")
    torch.manual_seed(0)
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0)
    (folder / "ckpts").mkdir()
    for name in ("weights.pth", "ckpts/a.pth", "ckpts/b.pth"):
        torch.save(
            {"state_dict": model.state_dict(), "args": {"model_kwargs": {"num_heads": 3}}}, folder / name
        )
    with torch.no_grad():
        assert model.pos_embed is not None
        model.pos_embed.copy_(sincos_2d(192, (8, 8)))  # MAE's mark
    torch.save({"model": model.state_dict(), "args": {"num_heads": 3}}, folder / "mae_pretrain_vit_base.pth")
    Image.effect_mandelbrot((96, 80), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "photo.jpg")
    (folder / "my_code.py").write_text(
        "import torch\nfrom timm.models.vision_transformer import VisionTransformer\n\n\n"
        "def build(path):\n"
        "    sizes = dict(img_size=64, patch_size=8, embed_dim=192, depth=2, num_heads=3)\n"
        "    model = VisionTransformer(**sizes, num_classes=0)\n"
        "    model.load_state_dict(torch.load(path)['state_dict'])\n    return model.eval()\n"
    )
    return folder


def execute(block: Block, folder: Path) -> None:
    if block.language == "yaml":
        name = re.match(r"# (\S+\.yaml)", block.text)
        assert name, f"{block.place}: the first line names the file, for example `# list.yaml`"
        (folder / name[1]).write_text(block.text)
        return
    if block.tag == "plan":
        lines = [
            shlex.join([*words, "--dry-run"] if words[1] in STARTS_CELLS else words)
            for words in list_commands(block)
        ]
        assert lines, f"{block.place} has no mae-bench command"
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
    elif block.language == "python":
        command = [sys.executable, "-c", block.text]
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.text]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block.place}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_work_as_written(page: Path, toys: Path, tmp_path: Path) -> None:
    blocks = read_blocks(page)
    assert not list_untagged(blocks)
    folder = Path(shutil.copytree(toys, tmp_path / "a folder", symlinks=True))
    for block in blocks:
        if block.tag in ("run", "plan"):
            assert not re.search(r"\bmake (test|demo|setup)\b", block.text), f"{block.place} runs for minutes"
            execute(block, folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_exist(page: Path) -> None:
    """Also of the blocks that are not executed: subcommands and options are parsed."""
    for block in read_blocks(page):
        for words in list_commands(block) if block.language == "bash" else []:
            command, rest = typer.main.get_command(app), words[1:]
            while hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            if "--help" not in rest:
                command.make_context(words[1], rest).close()


@pytest.mark.parametrize("fence", ["```bash", "```sh run", "```python", "```python plans", "```"])
def test_an_untagged_block_is_found(fence: str, tmp_path: Path) -> None:
    page = ROOT / "docs" / "page.md"
    (block,) = [Block(page, 1, *fence.removeprefix("```").partition(" ")[::2], "mae-bench demo\n")]
    assert list_untagged([block])


def test_a_broken_block_fails(tmp_path: Path) -> None:
    for language, text in (("bash", "mae-bench no-such-command | cat\n"), ("python", "1 / 0\n")):
        with pytest.raises(AssertionError, match=r"docs/page\.md:7"):
            execute(Block(ROOT / "docs" / "page.md", 7, language, "run", text), tmp_path)
