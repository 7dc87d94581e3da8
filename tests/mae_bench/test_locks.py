"""Locks between processes: who waits, for whom, and what a disk without locks does."""

import errno
import os
import resource
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from mae_bench.locks import file_lock, holder_of, try_lock


def test_who_waits_says_for_whom(tmp_path: Path) -> None:
    """Locks are of open files, so two threads exclude each other as two processes do."""
    path, said, order = tmp_path / "set.data", [], []
    waits = threading.Event()

    def say(message: str) -> None:
        said.append(message)
        waits.set()

    def follow() -> None:
        with file_lock(path, say):
            order.append("second")

    with file_lock(path, said.append):
        second = threading.Thread(target=follow)
        second.start()
        assert waits.wait(60)
        order.append("first")
    second.join()
    (message,) = said
    me = f"process {os.getpid()} on {socket.gethostname()} since 20"
    assert message.startswith(f"waiting for {me}")
    assert message.endswith(f"which holds {path}")
    assert order == ["first", "second"]
    with file_lock(path, said.append):
        assert len(said) == 1


def test_the_name_of_the_last_holder_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("process 1 on a machine with a long name since yesterday")
    with open(path, "a+", encoding="utf-8") as file:
        assert try_lock(file)
        assert holder_of(file).startswith(f"process {os.getpid()} on ")
        assert "yesterday" not in holder_of(file)


def test_a_disk_that_takes_no_byte_does_not_hinder_a_lock(tmp_path: Path) -> None:
    """Nor when the file is closed, which must not write once more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with open(tmp_path / ".lock", "a+", encoding="utf-8") as file:
            assert try_lock(file)
            assert holder_of(file) == "another process"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_without_locks_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="No locks available"), file_lock(tmp_path / "a"):
        pass
