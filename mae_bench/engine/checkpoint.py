"""Training states: sealed, readable by any number of processes, loaded as data only."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.seal import BrokenSeal, States, publish

VALUES_FILE = "values.json"
METADATA_FILE = ".metadata"

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[torch.Size, torch.dtype]]


class Checkpoints:
    """The last `keep` training states of a run: sealed folders `folder/step-XXXXXXXX/`.

    Tensors are stored in the format of torch.distributed.checkpoint under their names, independent of how
    they were sharded; all other values in `values.json`. All processes call `save` and `load` together.

    note: called with a message when a damaged state is skipped.
    """

    def __init__(self, folder: Path, keep: int, note: Callable[[str], None]):
        self.folder, self.states = folder, States(folder, keep, note)

    def save(self, step: int, tensors: Tensors, values: dict[str, Any]) -> None:
        """Write a state. On failure, earlier states are untouched and no partial state remains.

        Raise UserError on every process if the disk is full or fails.
        """
        part = self.folder / ".part"
        if world().is_main:
            shutil.rmtree(part, ignore_errors=True)
        _raise_on_all_ranks(None)  # a barrier: the remains of a killed run are removed before anyone writes
        try:
            _raise_on_all_ranks(_catch_disk_error(lambda: _write(part, tensors)))
            failure = None
            if world().is_main:
                failure = _catch_disk_error(lambda: self._publish(part, step, values))
            _raise_on_all_ranks(failure)
        except OSError as error:
            if world().is_main:
                shutil.rmtree(part, ignore_errors=True)
            raise UserError(
                f"the training state of step {step} could not be written to {self.folder}: {error}",
                expected="enough space on the disk",
                fix="free some space and re-run the same command to resume from the last state",
            ) from error

    def _publish(self, part: Path, step: int, values: dict[str, Any]) -> None:
        """Seal the state that all processes have written and remove old ones."""
        write_json(part / VALUES_FILE, values)
        publish(part, self.states.path(step))
        self.states.prune(step)

    def load(self, targets: Callable[[Shapes], Tensors]) -> dict[str, Any] | None:
        """Load the newest intact state into tensors and return its values, or None if there is no state.

        targets: given the saved shapes and dtypes by name, returns the tensors to fill; it may raise
            UserError to refuse the state.

        Raise UserError if there are states but none can be read.
        """
        for path in self._find_intact():
            problem = _first_problem(_read(path, targets))
            if not problem:
                return dict(json.loads((path / VALUES_FILE).read_text(encoding="utf-8")))
            self.states.skip(path, problem)
        return None

    def _find_intact(self) -> Iterator[Path]:
        """Yield on every process the states that the main process finds intact, the newest first."""
        states = self.states.find_intact()
        while True:
            found: Path | BrokenSeal | None = None
            if world().is_main:
                try:
                    found = next(states, None)
                except BrokenSeal as error:
                    found = error
            found = gather_over_ranks(found)[0]
            if isinstance(found, BrokenSeal):
                raise found
            if found is None:
                return
            yield found


class DataReader(FileSystemReader):
    """Reads states as data only.

    Tensors always are (`weights_only`); their metadata is a pickle, restricted here to the classes that
    describe tensors.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata. Raise pickle.UnpicklingError if it contains anything else."""
        with open(Path(self.path) / METADATA_FILE, "rb") as file:
            metadata: Metadata = DescriptionUnpickler(file).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class DescriptionUnpickler(pickle.Unpickler):
    """An unpickler restricted to descriptions of tensors."""

    allowed = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
        "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the class if it is allowed."""
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not describe a tensor")
        return super().find_class(module, name)


def _write(part: Path, tensors: Tensors) -> None:
    # Buffers differ between processes; those of the first one are saved
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_saver.save(dict(tensors), storage_writer=FileSystemWriter(part), planner=planner)


def _read(path: Path, targets: Callable[[Shapes], Tensors]) -> str:
    """Fill the targets; return the problem, or ""."""
    try:
        reader = DataReader(path)
        saved = reader.read_metadata().state_dict_metadata
        shapes = {
            name: (entry.size, entry.properties.dtype)
            for name, entry in saved.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_loader.load(dict(targets(shapes)), storage_reader=reader)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # damaged files raise many types
        return _describe_error(error)
    return ""


def _describe_error(error: BaseException) -> str:
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    return "; ".join(sorted({f"{type(cause).__name__}: {cause}" for cause in causes}))


def _catch_disk_error(action: Callable[[], None]) -> OSError | None:
    """Run an action; return an OSError that it raised, also if wrapped, and raise any other error."""
    try:
        action()
    except OSError as error:
        return error
    except CheckpointException as error:
        disk_errors = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        if not disk_errors:
            raise
        return disk_errors[0]
    return None


def _raise_on_all_ranks(failure: OSError | None) -> None:
    """Raise on every process an error of any of them; also a barrier."""
    failures = [f for f in gather_over_ranks(failure) if f is not None]
    if failures:
        raise failures[0]


def _first_problem(problem: str) -> str:
    """Return the first non-empty problem of all processes, or ""."""
    return next(filter(None, gather_over_ranks(problem)), "")
