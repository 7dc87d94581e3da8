"""Where the shards of a split lie: a folder of them, a pattern of paths, or a pattern of URLs that are fetched."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mae_bench.errors import UserError

NAMES = {"train": ("train",), "val": ("val", "validation", "valid")}  # a test split never stands in for val
EXPECTED = "PATH/train-{000000..000099}.tar, PATH/*.tar, a URL in braces, or train=PATTERN,val=PATTERN"


def spellings(split: str) -> tuple[str, ...]:
    """What a split is called in files."""
    return NAMES.get(split, (split,))


def is_url(root: str) -> bool:
    """Whether it is http or https; a Path of a URL has lost one of its slashes."""
    return re.match(r"https?:/+", root) is not None


def is_pattern(root: str) -> bool:
    """Whether it names shards themselves, not a folder."""
    if _named(root) or is_url(root):
        return True
    return root.endswith(".tar") and (re.search(r"[*?\[{]", root) is not None or Path(root).is_file())


def _named(root: str) -> dict[str, str]:
    """Split -> pattern of `train=PATTERN,val=PATTERN`."""
    parts = re.split(r",(?=(?:train|val)=)", root)
    return dict(part.split("=", 1) for part in parts) if re.match(r"(train|val)=", root) else {}


def has_pattern(root: str, split: str) -> bool:
    """Whether the pattern (one alone is train's) has shards for the split."""
    return split in (_named(root) or {"train": root})


def expand_pattern(root: str, split: str) -> list[str]:
    """The paths or URLs of a split's shards, in order; UserError if the pattern gives none for it."""
    if not has_pattern(root, split):
        raise UserError(
            f"{root} has no shards for {split}", expected=EXPECTED, fix=f"data=train={root},{split}=PATTERN"
        )
    pattern = (_named(root) or {split: root})[split]
    if is_url(pattern):
        return list(expand_braces(re.sub(r"^(https?):/+", r"\1://", pattern)))
    paths = [
        path
        for each in expand_braces(pattern)
        for path in (sorted(glob.glob(each)) if glob.has_magic(each) else [each])
    ]
    if lacking := [path for path in paths if not Path(path).is_file()] or ([pattern] if not paths else []):
        raise UserError(f"no shard at {lacking[0]}", expected=EXPECTED)
    return paths


def pattern_name(root: str) -> str:
    """What a set of shards is called: the folder that they lie in."""
    return Path((_named(root) or {"train": root}).get("train", root)).absolute().parent.name


def expand_braces(pattern: str) -> Iterator[str]:
    """`{000..011}` and `{a,b}` as a shell expands them."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        yield pattern
        return
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds:
        first, last = bounds.groups()
        padded = any(len(bound) > 1 and bound.startswith("0") for bound in bounds.groups())
        width = max(len(first), len(last)) if padded else 0
        items = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        items = found[1].split(",")
    for item in items:
        yield from expand_braces(pattern[: found.start()] + item + pattern[found.end() :])


def shards_in(root: Path, split: str) -> list[Path]:
    """The tars of a split below a folder: `train/*.tar` (without class folders beside them) or `train*.tar`; [] if none."""
    for name in spellings(split):
        inside = root / name
        if inside.is_dir():
            found = sorted(inside.glob("*.tar"))
            return [] if any(entry.is_dir() for entry in os.scandir(inside)) else found
        found = sorted(
            path for path in root.glob(f"{name}*.tar") if re.fullmatch(rf"{name}[-_.]?\d*", path.stem)
        )
        if found:
            return found
    return []
