"""Runs the pickle of a file that its user trusts, in a subprocess without network, and takes only data from it."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from backbones.reading.stand_ins import NotBuilt
from mae_bench.errors import UserError

TRUSTED = "read by running its pickle in a subprocess without network (--trust)"
CONTENT = (
    "content"  # where the subprocess describes what is no tensor, in the metadata of its safetensors file
)
PROGRAM = Path(__file__).with_name("unpickle_alone.py")
NOT_ALONE = 97  # its exit code where the network cannot be taken away
SECONDS, GRACE = 300, 30  # of the pickle, and beyond them for the program to end itself
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TOLD = 2000  # bytes of its last words


@contextmanager
def unpickled(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """A safetensors file (gone after the block) of what the open file's pickle makes: hostile until it is read as data.

    The subprocess has no network and no sockets, no environment, no other open files, a file system that it cannot write to
    (but for a folder in memory), and bounds on memory, time and processes. UserError where the system does not offer that (it is
    then not run at all), and where the pickle fails.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    with (
        tempfile.TemporaryFile() as made,
        tempfile.TemporaryFile() as words,
        tempfile.TemporaryDirectory() as folder,
    ):
        fds = file.fileno(), made.fileno()
        try:
            code = subprocess.run(
                [sys.executable, "-I", str(PROGRAM), *map(str, (*fds, size, SECONDS, folder))],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=words, pass_fds=fds, cwd="/",
                env=ENVIRONMENT | {"TMPDIR": folder, "HOME": folder},
                timeout=SECONDS + GRACE, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = -9
        if code or not os.fstat(made.fileno()).st_size:
            raise _failed(path, code, words)
        made.seek(0)
        yield made


def _failed(path: Path, code: int, words: IO[bytes]) -> UserError:
    words.seek(max(0, words.seek(0, os.SEEK_END) - TOLD))
    told = "".join(
        c if c.isprintable() else " "
        for c in words.read().decode(errors="replace").strip().split("\n")[-1][:300]
    )
    if code == NOT_ALONE:
        return UserError(
            f"{path} was not unpickled: a subprocess without network is not possible here: {told}",
            expected="Linux with user namespaces",
            fix="save its state_dict elsewhere, in a place that you can lose",
        )
    return UserError(
        f"{path} cannot be unpickled: {told or f'the subprocess ended with {code}'}",
        expected="a whole checkpoint, and the packages installed here that it is made of",
        fix="save the model's state_dict in the environment that the file comes from",
    )


def rebuild(tensors: Mapping[str, torch.Tensor], content: str | None, path: Path) -> Any:
    """What the subprocess describes, with its tensors in their places; UserError for a description that is none."""
    try:
        return _value(json.loads(content or ""), tensors)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise UserError(
            f"{path}: what its pickle made cannot be read: {error}", expected="a checkpoint"
        ) from error


def _value(told: list[Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """A pair of what it is and what is in it (`unpickle_alone.describe`)."""
    kind, inside = told
    if kind == "tensor":
        return tensors[inside]
    if kind in ("dict", "namespace"):
        filled = {key: _value(value, tensors) for key, value in inside}
        return filled if kind == "dict" else argparse.Namespace(**filled)
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_value(value, tensors) for value in inside)
    if kind == "value" and isinstance(inside, str | int | float | None):
        return inside
    return NotBuilt()
