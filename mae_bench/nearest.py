"""What may have been meant by a name that nobody knows, or by a path where nothing is."""

import difflib
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")  # OWNER/NAME@REVISION
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".json", ".ckpt")
LOOKED_AT = 10_000  # names of a folder


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The known names that are spelled like this one, as a question; "" for none. cutoff: of their likeness, 0 to 1."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _names_in(folder: Path) -> list[str]:
    try:
        return [child.name for child in islice(folder.iterdir(), LOOKED_AT)]
    except OSError:  # a folder that may not be listed
        return []


def near_path(path: str | Path) -> str:
    """For a path where nothing is: the nearest names in its folder, or the repository of the hub that it may be; else ""."""
    path = Path(path)
    if path.parent.is_dir():
        names = _names_in(path.parent)
        near = difflib.get_close_matches(path.name, sorted(names), n=3, cutoff=0.4)  # of the names, without their folder
        return f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    return f"if it is a repository of the hub: hf:{path}" if HUB.fullmatch(str(path)) and path.suffix not in WEIGHTS else ""
