"""Errors the user can fix, and the nearest known name for a misspelled one."""

import difflib
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")  # OWNER/NAME@REVISION
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".json", ".ckpt")
MAX_NAMES = 10_000  # of a folder that are compared


class UserError(Exception):
    """An error the user can fix; the command line prints it without a traceback and exits with 2,
    or with 1 if a full disk is its cause.

    Args:
        given: what was found, with its place (a path, a key, a value).
        expected: what would have been correct.
        fix: what to do next, if possible a command.
    """

    def __init__(self, given: str, *, expected: str = "", fix: str = ""):
        self.given, self.expected, self.fix = given, expected, fix
        parts = [given, expected and f"Expected: {expected}", fix and f"Next: {fix}"]
        super().__init__("\n".join(part for part in parts if part))

    @property
    def reason(self) -> str:
        """What was given and, in brackets, what was expected."""
        return f"{self.given} (expected: {self.expected})" if self.expected else self.given


class NotInstalled(UserError):
    """An optional package is missing: its cells are reported as "not installed", and the other cells run."""


class Interrupted(Exception):
    """The job was asked to stop, by a signal or the end of its parent process; its state is saved."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return the closest known names as a question; "" if none reaches the similarity `cutoff` (0 to 1)."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _names_in(folder: Path) -> list[str]:
    try:
        return [child.name for child in islice(folder.iterdir(), MAX_NAMES)]
    except OSError:  # a folder without read permission
        return []


def near_path(path: str | Path) -> str:
    """Suggest what a missing path may mean: a similar name in its folder, or a hub repository; else ""."""
    path = Path(path)
    if path.parent.is_dir():
        names = _names_in(path.parent)
        near = difflib.get_close_matches(path.name, sorted(names), n=3, cutoff=0.4)
        return f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    if HUB.fullmatch(str(path)) and path.suffix not in WEIGHTS:
        return f"if it is a repository of the hub: hf:{path}"
    return ""
