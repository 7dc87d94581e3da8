"""Kill runners within a second of the start of their first child, and count the processes that stay alive."""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from benchmarks.measure import Table, positive_int, run_main, write_table
from mae_bench.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FAKE_KINDS = ROOT / "tests" / "mae_bench" / "fake_kinds.py"  # `mae-bench` with jobs that need no framework
MARK = "MAE_BENCH_ORPHANS"  # environment variable that a runner's descendants inherit
WINDOW_SECONDS = 1.0  # a kill falls into this time after the start of the first child
PATIENCE_SECONDS = 5.0  # for the descendants to end
START_SECONDS = 120.0  # for the first child to start
POLL_SECONDS = 0.01
NUM_IMAGES = 2000  # of the set to pack: more than a packer does before it is killed

Start = Callable[[str, Path], int]  # (mark, empty folder) -> pid of the runner

SUITES: dict[str, dict[str, Any]] = {
    "workers": {
        "backbones": {name: {"kind": "fake_maker", "behave": "wait with children"} for name in ("a", "b")},
        "jobs": 2,
    },
    "ranks": {"backbones": {"a": {"kind": "fake_pretraining", "behave": "wait"}}, "processes": 2, "jobs": 1},
}


@dataclass(frozen=True)
class Kill:
    """A kill: seconds after the start of the first child, and what became of the descendants.

    alive: number of descendants when the runner was killed. left: of those and later ones, after
    PATIENCE_SECONDS. seconds: until none was left.
    """

    what: str
    after: float
    alive: int
    left: int
    seconds: float


def is_alive(pid: int) -> bool:
    """Whether the process runs: one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def find_marked(mark: str) -> list[int]:
    """Return the pids of the running processes that were started with this mark."""
    found, entry = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                marked = entry in (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if marked and is_alive(int(folder.name)):
                found.append(int(folder.name))
    return found


def kill_runner(what: str, start: Start, folder: Path, after: float) -> Kill:
    """Start a runner, kill it `after` seconds after its first child has started, and see what is left."""
    mark = uuid.uuid4().hex
    runner = start(mark, folder)
    try:
        _wait_for_child(runner, mark)
        time.sleep(after)
        alive = len(_children(runner, mark))
    finally:
        os.kill(runner, signal.SIGKILL)
        os.waitpid(runner, 0)
    killed = time.monotonic()
    while (left := find_marked(mark)) and time.monotonic() - killed < PATIENCE_SECONDS:
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - killed
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return Kill(what, after, alive, len(left), seconds)


def _children(runner: int, mark: str) -> list[int]:
    return [pid for pid in find_marked(mark) if pid != runner]


def _wait_for_child(runner: int, mark: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _children(runner, mark):
        if not is_alive(runner) or time.monotonic() > deadline:
            raise UserError("the runner started no process", expected="a worker", fix="run it by hand")
        time.sleep(POLL_SECONDS)


def start_suite(name: str) -> Start:
    """Return a function that runs one of SUITES in a process of its own."""

    def start(mark: str, folder: Path) -> int:
        file = folder / "suite.yaml"
        file.write_text(
            json.dumps({"name": name, "out": str(folder / "out"), "device": "cpu"} | SUITES[name])
        )
        return _start([str(FAKE_KINDS), "run", str(file)], mark)

    return start


def start_pack(images: Path) -> Start:
    """Return a function that runs `mae-bench data pack` on two processes."""

    def start(mark: str, folder: Path) -> int:
        command = ["data", "pack", str(images), str(folder / "packed"), "--num-workers", "2"]
        return _start(["-m", "mae_bench", *command], mark)

    return start


def _start(command: list[str], mark: str) -> int:
    path = os.pathsep.join([str(ROOT), str(FAKE_KINDS.parent)])
    environment = os.environ | {MARK: mark, "PYTHONPATH": path}
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=quiet, stderr=quiet).pid


def write_images(folder: Path) -> None:
    """Write NUM_IMAGES images of 64 x 64 pixels in class folders."""
    for number in range(NUM_IMAGES):
        place = folder / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 90).convert("RGB").save(place / f"{number}.png")


def kill_many(starts: dict[str, Start], num_kills: int, seed: int, folder: Path) -> list[Kill]:
    """Kill each kind of runner in turn, `num_kills` times in all, at random moments."""
    draw, kills = random.Random(seed), []
    for number in range(num_kills):
        what = list(starts)[number % len(starts)]
        here = folder / f"run-{number}"
        here.mkdir()
        kills.append(kill_runner(what, starts[what], here, draw.uniform(0, WINDOW_SECONDS)))
    return kills


def summarise(kills: Iterable[Kill]) -> Table:
    """Return a row per kind of runner."""
    groups: dict[str, list[Kill]] = {}
    for kill in kills:
        groups.setdefault(kill.what, []).append(kill)
    rows = [
        [
            what,
            len(group),
            f"{statistics.mean(kill.alive for kill in group):.1f}",
            sum(kill.left for kill in group),
            f"{statistics.median(kill.seconds for kill in group):.2f}",
            f"{max(kill.seconds for kill in group):.2f}",
        ]
        for what, group in groups.items()
    ]
    return Table(
        "Processes left by killed runners",
        ["runner", "kills", "alive at the kill", f"left after {PATIENCE_SECONDS:g} s", "median s", "max s"],
        rows,
        "Each runner was killed (SIGKILL) 0 to 1 s after the start of its first child. `alive at the kill`: "
        "mean number of its processes then. `median s`, `max s`: until all of them had ended.",
    )


def main() -> None:
    """Measure, print and write the table; exit with 1 if a process stayed alive."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orphans", description=__doc__)
    parser.add_argument("--kills", type=positive_int, default=200, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, help="also write OUT.md and OUT.json")
    given = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "images")
        starts = {name: start_suite(name) for name in SUITES} | {"data pack": start_pack(folder / "images")}
        kills = kill_many(starts, given.kills, given.seed, folder)
    write_table("No orphans", [summarise(kills)], {"kills": [asdict(kill) for kill in kills]}, given.out)
    if any(kill.left for kill in kills):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
