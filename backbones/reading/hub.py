"""Checkpoints of the Hugging Face hub: the few files that hold weights and their description, at one commit."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils.logging import get_logger

from mae_bench.errors import UserError

DESCRIPTIONS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
WEIGHTS = (  # in the order of preference: what cannot hold code first, a repository's own format before another library's
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("open_clip_model.safetensors",),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
    ("open_clip_pytorch_model.bin",),
)


def fetch_repo(name: str) -> tuple[Path, str, list[str]]:
    """REPO@REVISION as (its folder in the hub's cache, REPO@COMMIT, notes); without a revision it is main.

    A revision that may move is noted with the commit that it stood for. UserError where the hub or the cache does not have it.
    """
    repo, _, wanted = name.partition("@")
    revision = wanted or "main"
    for patterns in WEIGHTS:
        folder = _download(repo, revision, patterns)
        revision = folder.name  # the commit
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            break
    pinned = f"{repo}@{revision}"
    return (
        folder,
        pinned,
        [] if wanted == revision else [f"{wanted or 'main'} of {repo} is {revision}; hf:{pinned} pins it"],
    )


class _First(logging.Filter):
    """Lets one record through."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        first, self.told = not self.told, True
        return first


@contextmanager
def log_once() -> Iterator[None]:
    """What the hub's client has to say while it tries again and again is printed once."""
    filters = [(handler, _First()) for handler in get_logger().handlers]
    for handler, first in filters:
        handler.addFilter(first)
    try:
        yield
    finally:
        for handler, first in filters:
            handler.removeFilter(first)


def _download(repo: str, revision: str, patterns: tuple[str, ...]) -> Path:
    try:
        with log_once():
            return Path(snapshot_download(repo, revision=revision, allow_patterns=[*DESCRIPTIONS, *patterns]))
    except Exception as error:  # the client's own types, httpx's and OSError: to the user all mean one thing
        reason = f"{type(error).__name__}: {(str(error).strip() or ' ').splitlines()[0]}"
        raise UserError(
            f"the hub cannot provide {repo} at {revision}: {reason}",
            expected="hf:OWNER/NAME@REVISION that is public or that your login may read, and a network or the hub's cache",
            fix="download the folder elsewhere and give its path",
        ) from error
