"""Find the shards of a split: in a folder, by a pattern of paths, or by a pattern of URLs to download."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mae_bench.errors import UserError

NAMES = {"train": ("train",), "val": ("val", "validation", "valid")}  # a test split is never used as val
EXPECTED = "PATH/train-{000000..000099}.tar, PATH/*.tar, a URL in braces, or train=PATTERN,val=PATTERN"


def split_names(split: str) -> tuple[str, ...]:
    """Return the names that a split may have in paths."""
    return NAMES.get(split, (split,))


def is_url(root: str) -> bool:
    """Return whether this is an http or https URL; a Path made from a URL has lost one of its slashes."""
    return re.match(r"https?:/+", root) is not None


def is_pattern(root: str) -> bool:
    """Return whether this names shards rather than a folder."""
    if _parse_patterns(root) or is_url(root):
        return True
    return root.endswith(".tar") and (re.search(r"[*?\[{]", root) is not None or Path(root).is_file())


def _parse_patterns(root: str) -> dict[str, str]:
    """Return the pattern of each split in `train=PATTERN,val=PATTERN`; {} for any other form."""
    if not re.match(r"(train|val)=", root):
        return {}
    return dict(part.split("=", 1) for part in re.split(r",(?=(?:train|val)=)", root))


def has_pattern(root: str, split: str) -> bool:
    """Return whether the pattern has shards for the split; a single pattern is that of train."""
    return split in (_parse_patterns(root) or {"train": root})


def expand_pattern(root: str, split: str) -> list[str]:
    """Return the paths or URLs of a split's shards, in order; raise UserError if there are none."""
    if not has_pattern(root, split):
        raise UserError(
            f"{root} has no shards for {split}", expected=EXPECTED, fix=f"data=train={root},{split}=PATTERN"
        )
    pattern = (_parse_patterns(root) or {split: root})[split]
    if is_url(pattern):
        return list(expand_braces(re.sub(r"^(https?):/+", r"\1://", pattern)))
    paths: list[str] = []
    for each in expand_braces(pattern):
        paths += sorted(glob.glob(each)) if glob.has_magic(each) else [each]
    missing = [path for path in paths if not Path(path).is_file()] if paths else [pattern]
    if missing:
        raise UserError(f"no shard at {missing[0]}", expected=EXPECTED)
    return paths


def name_pattern(root: str) -> str:
    """Return the name of a set of shards: that of the folder they are in."""
    return Path((_parse_patterns(root) or {"train": root}).get("train", root)).absolute().parent.name


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand `{000..011}` and `{a,b}` as a shell does."""
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


def find_shards(root: Path, split: str) -> list[Path]:
    """Return the tars of a split below a folder: `train/*.tar` (unless it has folders) or `train*.tar`."""
    for name in split_names(split):
        inside = root / name
        if inside.is_dir():
            has_folders = any(entry.is_dir() for entry in os.scandir(inside))
            return [] if has_folders else sorted(inside.glob("*.tar"))
        tars = sorted(root.glob(f"{name}*.tar"))
        shards = [path for path in tars if re.fullmatch(rf"{name}[-_.]?\d*", path.stem)]
        if shards:
            return shards
    return []
