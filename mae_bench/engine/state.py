"""Training state on disk: saved whole or not at all, read as data only, refused when it belongs to another run."""

from pathlib import Path
from typing import Any

import torch

from mae_bench.errors import UserError
from mae_bench.files import write_atomic

STATE_FILE = "state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes the state; a full disk leaves the last good one (UserError)."""
    try:
        write_atomic(folder / STATE_FILE, lambda file: torch.save(state, file))
    except OSError as error:
        raise UserError(
            f"the training state could not be written to {folder}: {error}",
            expected="room on the disk",
            fix="free some and run the same command again: it goes on from the last state",
        ) from error


def load_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The saved state, or None where there is none; an unreadable file raises UserError."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise UserError(
            f"{path} cannot be read: {error}",
            expected="the training state of this run",
            fix=f"remove {path} to start this job again from its beginning",
        ) from error
