"""Download checkpoints from the Hugging Face hub: only the weights and their description, at one commit."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils.logging import get_logger

from mae_bench.errors import UserError

DESCRIPTIONS = ("config.json", "preprocessor_config.json", "open_clip_config.json", "README.md")
# In order of preference: safetensors before pickles, the repository's own format before another library's.
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("open_clip_model.safetensors",),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
    ("open_clip_pytorch_model.bin",),
)


def fetch_repo(name: str) -> tuple[Path, str, list[str]]:
    """Return the cache folder of REPO@REVISION (default main), REPO@COMMIT, and notes.

    If the revision is not a commit, a note states the commit it resolved to. Raises UserError if neither the
    hub nor its cache has the repository.
    """
    repo, _, wanted = name.partition("@")
    revision = wanted or "main"
    for patterns in WEIGHTS:
        folder = _download(repo, revision, patterns)
        revision = folder.name  # the commit
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            break
    pinned = f"{repo}@{revision}"
    notes = []
    if wanted != revision:
        notes.append(f"{wanted or 'main'} of {repo} is {revision}; hf:{pinned} pins it")
    return folder, pinned, notes


class _FirstRecord(logging.Filter):
    """Let one record through."""

    passed = False

    def filter(self, record: logging.LogRecord) -> bool:
        first, self.passed = not self.passed, True
        return first


@contextmanager
def log_once() -> Iterator[None]:
    """Print only the first log record of the hub's client, which repeats itself at every retry."""
    filters = [(handler, _FirstRecord()) for handler in get_logger().handlers]
    for handler, first in filters:
        handler.addFilter(first)
    try:
        yield
    finally:
        for handler, first in filters:
            handler.removeFilter(first)


def _download(repo: str, revision: str, patterns: tuple[str, ...]) -> Path:
    files = [*DESCRIPTIONS, *patterns]
    try:
        with log_once():
            return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as error:  # the client's own types, httpx's and OSError all mean the same to the user
        reason = f"{type(error).__name__}: {(str(error).strip() or ' ').splitlines()[0]}"
        raise UserError(
            f"the hub cannot provide {repo} at {revision}: {reason}",
            expected="a public hf:OWNER/NAME@REVISION or one your login may read, and a network or the cache",
            fix="download the folder elsewhere and give its path",
        ) from error
