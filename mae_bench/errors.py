"""Errors the user can fix, and the nearest known name for a misspelled one."""

import difflib
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")  # OWNER/NAME@REVISION
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".json", ".ckpt")
LOOKED_AT = 10_000  # names of a folder


class UserError(Exception):
    """A mistake that its user can mend; the command line prints it without a traceback and exits with 2.

    given: what was found, with its place (a path, a key, a value).
    expected: what would have been right.
    fix: the next thing to do, a command where there is one.
    """

    def __init__(self, given: str, *, expected: str = "", fix: str = ""):
        self.given, self.expected, self.fix = given, expected, fix
        parts = [given, expected and f"Expected: {expected}", fix and f"Next: {fix}"]
        super().__init__("\n".join(part for part in parts if part))


class NotInstalled(UserError):
    """An optional framework is missing: the cell is reported as 'not installed' with the command, and the rest runs."""


class Interrupted(Exception):
    """The job was asked to stop (SIGTERM, SIGINT, its parent gone); its state is saved and a second run goes on."""


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
        near = difflib.get_close_matches(
            path.name, sorted(names), n=3, cutoff=0.4
        )  # of the names, without their folder
        return f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    return (
        f"if it is a repository of the hub: hf:{path}"
        if HUB.fullmatch(str(path)) and path.suffix not in WEIGHTS
        else ""
    )
