"""Training states on disk: each whole or not there, the last few kept, readable by any number of processes, read as data."""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.errors import UserError
from mae_bench.files import write_json

INDEX_FILE = "index.json"
VALUES_FILE = "values.json"
METADATA_FILE = ".metadata"

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[torch.Size, torch.dtype]]


class Checkpoints:
    """The last `keep` training states of a run, in `folder/step-XXXXXXXX/`, listed oldest first in `folder/index.json`.

    Tensors are in the format of torch.distributed.checkpoint, by name and whichever way they were split; numbers and words are in
    `values.json`. All processes call `save` and `load` together. `note` is told when a damaged state is passed over.
    """

    def __init__(self, folder: Path, keep: int, note: Callable[[str], None]):
        self.folder, self.keep, self.note = folder, keep, note
        self._index: list[dict[str, Any]] = _read_index(folder)

    def save(self, step: int, tensors: Tensors, values: dict[str, Any]) -> None:
        """Writes a state; whatever fails leaves those before it as they were and nothing of itself.

        A full disk raises UserError on every process.
        """
        part = self.folder / ".part"
        if world().is_main:
            shutil.rmtree(part, ignore_errors=True)
        _agree(None)  # nobody writes before the remains of a killed run are gone
        try:
            _agree(_failure(lambda: _write(part, tensors)))
            _agree(_failure(lambda: self._publish(part, step, values)) if world().is_main else None)
        except OSError as error:
            if world().is_main:
                shutil.rmtree(part, ignore_errors=True)
            raise UserError(
                f"the training state of step {step} could not be written to {self.folder}: {error}",
                expected="room on the disk",
                fix="free some and run the same command again: it goes on from the last state",
            ) from error

    def _publish(self, part: Path, step: int, values: dict[str, Any]) -> None:
        write_json(part / VALUES_FILE, values)
        name = f"step-{step:08d}"
        shutil.rmtree(
            self.folder / name, ignore_errors=True
        )  # a state of this step that was passed over, or never listed
        os.rename(part, self.folder / name)
        _sync(self.folder)
        entry = {"step": step, "folder": name, "bytes": _sizes(self.folder / name)}
        index = [*(e for e in self._index if e["step"] < step), entry][-self.keep :]
        write_json(self.folder / INDEX_FILE, {"checkpoints": index})
        self._index = index
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in {e["folder"] for e in index}:
                shutil.rmtree(path)

    def load(self, targets: Callable[[Shapes], Tensors]) -> dict[str, Any] | None:
        """Fills tensors in from the newest state that can be read and returns its values; None where there is no state.

        targets: from what is saved (shapes and dtypes by name), the tensors to fill; it may raise UserError to refuse the state.
        UserError too when there are states and none can be read.
        """
        problem = ""
        for entry in reversed(self._index):
            path = self.folder / entry["folder"]
            problem = _agreed(_damage(path, entry["bytes"])) or _agreed(_read(path, targets))
            if not problem:
                self._index = [e for e in self._index if e["step"] <= entry["step"]]
                return dict(json.loads((path / VALUES_FILE).read_text(encoding="utf-8")))
            self.note(f"{path} cannot be read ({problem}); trying the state before it")
        if not problem:
            return None
        raise UserError(
            f"no training state in {self.folder} can be read: {problem}",
            expected="the training states of this run",
            fix=f"remove {self.folder} to start this job again from its beginning",
        )


class DataReader(dcp.FileSystemReader):
    """Reads states as data. Tensors always are (`weights_only`); their metadata is a pickle, of which only the classes that
    describe tensors are let in."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata; pickle.UnpicklingError where it holds anything else."""
        with open(Path(self.path) / METADATA_FILE, "rb") as file:
            metadata: Metadata = DescriptionUnpickler(file).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class DescriptionUnpickler(pickle.Unpickler):
    """An unpickler of tensors' descriptions and of nothing that could act."""

    allowed = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
        "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is one of those."""
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not describe a tensor")
        return super().find_class(module, name)


def _write(part: Path, tensors: Tensors) -> None:
    # Buffers differ between processes, and the first one's count.
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(part), planner=planner)


def _read(path: Path, targets: Callable[[Shapes], Tensors]) -> str:
    """Fills the targets; why it could not, or nothing."""
    try:
        reader = DataReader(path)
        saved = reader.read_metadata().state_dict_metadata
        shapes = {
            name: (m.size, m.properties.dtype)
            for name, m in saved.items()
            if isinstance(m, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(targets(shapes)), storage_reader=reader)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # damaged files raise many types
        return _told(error)
    return ""


def _damage(path: Path, sizes: dict[str, int]) -> str:
    """What can be seen of a damage without a process waiting for the others in vain."""
    try:
        json.loads((path / VALUES_FILE).read_text(encoding="utf-8"))
        DataReader(path).read_metadata()
        return "" if _sizes(path) == sizes else "its files do not have the sizes that they were written with"
    except Exception as error:  # damaged files raise many types
        return _told(error)


def _told(error: BaseException) -> str:
    causes = (
        [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    )
    return "; ".join(sorted({f"{type(cause).__name__}: {cause}" for cause in causes}))


def _failure(action: Callable[[], None]) -> OSError | None:
    """The disk's refusal of an action, wherever in it; anything else that fails is raised."""
    try:
        action()
    except OSError as error:
        return error
    except CheckpointException as error:
        refusals = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        if not refusals:
            raise
        return refusals[0]
    return None


def _agree(failure: OSError | None) -> None:
    """Raises on every process what failed on any."""
    if failures := [f for f in gather_over_ranks(failure) if f is not None]:
        raise failures[0]


def _agreed(problem: str) -> str:
    return next(filter(None, gather_over_ranks(problem)), "")


def _read_index(folder: Path) -> list[dict[str, Any]]:
    """The listed states; where the list itself is damaged, whatever lies there under a final name."""
    path = folder / INDEX_FILE
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["checkpoints"])
    except (ValueError, KeyError, TypeError):
        found = sorted(folder.glob("step-*"))
        return [
            {"step": int(p.name.removeprefix("step-")), "folder": p.name, "bytes": _sizes(p)} for p in found
        ]


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _sync(folder: Path) -> None:
    """The disk keeps a new name only once its folder is written too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
