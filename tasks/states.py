"""Training states of a framework's trainer: two are kept, and a damaged one is passed over."""

from collections.abc import Callable
from pathlib import Path

from mae_bench.config import JobConfig
from mae_bench.errors import UserError
from mae_bench.job import STATES
from mae_bench.seal import BrokenSeal, States
from tasks.context import TaskContext

STATE_FILE = "state.pth"  # in the folder of a state
NUM_STATES = 2


class TrainerStates:
    """The sealed training states of a job, each in one file that a framework writes and reads.

    last: the file of the last state that was saved or found; None if there is none.
    """

    def __init__(self, context: TaskContext[JobConfig]):
        self._states = States(context.job.dir / STATES, NUM_STATES, context.progress.note)
        self.last: Path | None = None

    def find(self) -> Path | None:
        """Return the file of the newest intact state, None if there is none.

        A damaged state is noted and the one before it is used; without an intact one, the training starts
        from the beginning, with a note.
        """
        try:
            state = next(self._states.find_intact(), None)
        except BrokenSeal as error:
            self._states.note(f"{error.given}; the training starts from the beginning")
            state = None
        self.last = state / STATE_FILE if state else None
        return self.last

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Save the state after `step` steps, once: `write` is given its path.

        Raise UserError if the disk is full or fails; earlier states are then untouched.
        """
        path = self._states.path(step) / STATE_FILE
        if path == self.last:
            return
        try:
            with self._states.write(step) as folder:
                write(folder / STATE_FILE)
        except OSError as error:
            raise UserError(
                f"the training state could not be written to {self._states.folder}: {error}",
                expected="enough space on the disk",
                fix="free some space and re-run the same command to resume from the last state",
            ) from error
        self.last = path

    def describe_last(self) -> str:
        """Return which state a failed training can be looked at in."""
        return (
            f"the last good training state is {self.last}" if self.last else "no training state was saved yet"
        )
