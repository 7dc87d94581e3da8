"""The worker process: exit codes, and what lies in the cell's folder afterwards."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mae_bench.environment.code import digest_kind
from mae_bench.errors import UserError
from mae_bench.files import file_digest, json_digest
from mae_bench.job import STATES
from mae_bench.locks import try_lock
from mae_bench.progress import EVENTS_FILE
from mae_bench.record import read_failure, read_record
from mae_bench.registry import kind
from mae_bench.runner.worker import (
    INTERRUPTED,
    LOCK_FILE,
    Order,
    digest_artefacts,
    environment,
    failure_of,
)
from mae_bench.seal import BrokenSeal
from mae_bench.suite.cell import CELL_FILE, Cell


def order(folder: Path, **config: Any) -> Order:
    full = {"kind": "fake_transfer", "protocol": "probe", "data": "there", **config}
    cell = Cell("mae", "probe", "imagenet", "fake_transfer", full, 3, "key", folder)
    written = Order(cell, kind("fake_transfer"), "cpu", 1, "mae-bench run x")
    folder.mkdir(exist_ok=True)
    written.write()
    return written


def work(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mae_bench.runner.worker", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_order_comes_back_as_it_was_written(fake_kinds: Path, tmp_path: Path) -> None:
    written = order(tmp_path)
    assert Order.read(tmp_path) == written
    upstream = Order(Cell(**vars(written.cell) | {"upstream": tmp_path / "up"}), written.kind, "cuda", 2, "")
    upstream.write()
    assert Order.read(tmp_path) == upstream
    stored = json.loads((tmp_path / CELL_FILE).read_text())["cell"]
    assert (stored["task"], stored["family"]) == ("probe", "imagenet"), "the names in the file stay"


def test_an_order_that_was_changed_is_not_run(fake_kinds: Path, tmp_path: Path) -> None:
    order(tmp_path)
    text = (tmp_path / CELL_FILE).read_text()
    assert '"seed": 3' in text
    (tmp_path / CELL_FILE).write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(BrokenSeal, match=CELL_FILE) as error:
        Order.read(tmp_path)
    assert "re-run mae-bench run" in error.value.fix


def test_a_record_is_written_last(fake_kinds: Path, tmp_path: Path) -> None:
    order(tmp_path, score=2.5)
    assert work(tmp_path).returncode == 0
    record = read_record(tmp_path / "record.json")
    assert (record.backbone, record.seed, record.protocol, record.score.value) == ("mae", 3, "probe", 5.5)
    assert record.config_digest == json_digest(
        {"kind": "fake_transfer", "protocol": "probe", "score": 2.5}
    ), "the folder of the data is no method"
    assert (record.protocol_version, record.code_digest) == (1, digest_kind(kind("fake_transfer")))
    assert record.artefact_digests == {
        "runs": {"sha256": file_digest(tmp_path / "runs.txt"), "bytes": len("run\n")}
    }, "what is missing has no digest"
    assert not (tmp_path / "failure.json").exists()


def test_each_file_of_an_artefact_that_is_a_folder_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "model" / "parts").mkdir(parents=True)
    (tmp_path / "model" / "spec.json").write_text("{}")
    (tmp_path / "model" / "parts" / "1").write_bytes(b"")
    assert digest_artefacts(tmp_path, {"weights": "model"}) == {
        "weights/parts/1": {
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "bytes": 0,
        },
        "weights/spec.json": {"sha256": file_digest(tmp_path / "model" / "spec.json"), "bytes": 2},
    }


def test_a_damaged_or_missing_export_is_made_again_by_its_own_cell(fake_kinds: Path, tmp_path: Path) -> None:
    maker = tmp_path / "maker"
    cell = Cell(**vars(order(tmp_path / "transfer").cell) | {"upstream": maker})
    for given in (f"no weight file {maker}/export", f"{maker}/export/backbone.json: its seal is broken"):
        failure = failure_of(cell, UserError(given, fix="export the backbone again"))
        assert failure.fix == f"restore it from a copy, or remove {maker} to make the backbone again"
    assert failure_of(cell, UserError("no data", fix="unpack it")).fix == "unpack it"


@pytest.mark.parametrize("behave", ["user error", "not installed", "exception"])
def test_a_failure_stands_in_the_records_place(fake_kinds: Path, tmp_path: Path, behave: str) -> None:
    order(tmp_path, behave=behave)
    done = work(tmp_path)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == (behave == "exception")
    failure = read_failure(tmp_path / "failure.json")
    assert failure.status == ("not installed" if behave == "not installed" else "failed")
    assert failure.seed == 3
    assert not (tmp_path / "record.json").exists()


def test_a_full_disk_is_told_as_what_it_is_and_keeps_the_training_states(
    fake_kinds: Path, tmp_path: Path
) -> None:
    order(tmp_path, behave="full disk")
    (tmp_path / STATES).mkdir()
    done = work(tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    failure = read_failure(tmp_path / "failure.json")
    assert "the disk is full" in failure.reason
    assert "free some" in failure.fix
    assert (tmp_path / STATES).is_dir()


def test_training_states_go_once_the_record_is_there_and_not_before(fake_kinds: Path, tmp_path: Path) -> None:
    order(tmp_path)
    (tmp_path / STATES).mkdir()
    (tmp_path / "record.json").mkdir()  # so that no record can be written
    assert work(tmp_path).returncode == 1
    assert (tmp_path / STATES).is_dir()
    (tmp_path / "record.json").rmdir()
    assert work(tmp_path).returncode == 0
    assert not (tmp_path / STATES).exists()


def test_a_config_that_does_not_fit_is_named(fake_kinds: Path, tmp_path: Path) -> None:
    order(tmp_path, scor=1)
    assert work(tmp_path).returncode == 1
    assert "the nearest known key is 'score'" in read_failure(tmp_path / "failure.json").reason


def test_the_environment_holds_threads_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    chosen = environment(2, "1")
    assert (chosen["OMP_NUM_THREADS"], chosen["MKL_NUM_THREADS"], chosen["CUDA_VISIBLE_DEVICES"]) == (
        "2",
        "2",
        "1",
    )
    assert environment(2, "")["CUDA_VISIBLE_DEVICES"] == ""
    assert "PATH" in chosen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert environment(2, None)["CUDA_VISIBLE_DEVICES"] == "3"


def test_an_order_is_plain_json(fake_kinds: Path, tmp_path: Path) -> None:
    order(tmp_path)
    assert json.loads((tmp_path / CELL_FILE).read_text())["kind"]["run"] == "fake_kinds:run"


def test_a_worker_that_waits_for_another_hears_a_stop(fake_kinds: Path, tmp_path: Path) -> None:
    order(tmp_path)
    with open(tmp_path / LOCK_FILE, "a+", encoding="utf-8") as lock:
        assert try_lock(lock)
        process = subprocess.Popen([sys.executable, "-m", "mae_bench.runner.worker", str(tmp_path)])
        while not hears(Path(f"/proc/{process.pid}/status").read_text()):
            time.sleep(0.05)
        while "waiting for" not in (tmp_path / EVENTS_FILE).read_text():
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=60) == INTERRUPTED
    (note,) = (json.loads(line)["note"] for line in (tmp_path / EVENTS_FILE).read_text().splitlines())
    assert f"waiting for process {os.getpid()} on {socket.gethostname()} since 20" in note
    assert not (tmp_path / "runs.txt").exists()


def hears(status: str) -> bool:
    """Whether a process, as /proc tells of it, has a handler for SIGUSR1: then it has all of them."""
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def test_a_record_that_another_worker_has_written_meanwhile_stands(fake_kinds: Path, tmp_path: Path) -> None:
    order(tmp_path)
    assert work(tmp_path).returncode == 0
    assert work(tmp_path).returncode == 0
    assert (tmp_path / "runs.txt").read_text().split() == ["run"]
