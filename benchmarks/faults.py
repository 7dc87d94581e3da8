"""Flip single bytes of every file that mae-bench reads back, and see whether a result changes unnoticed."""

import argparse
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import Table, positive_int, run_main, write_table
from benchmarks.read_back import Case, Listener, Observed, build_cases, observe, small_caches
from mae_bench.errors import UserError

RECOVERED, REFUSED, LEFT_OUT, HARMLESS = "recovered", "refused", "left out", "harmless"
UNNOTICED, TRACEBACK = "unnoticed", "traceback"
OUTCOMES = (RECOVERED, REFUSED, LEFT_OUT, HARMLESS, UNNOTICED, TRACEBACK)
MAX_SHOWN = 5  # tracebacks that are printed


@dataclass
class Flips:
    """The outcomes of the flips of one file."""

    case: str
    file: str
    num_bytes: int
    outcomes: Counter[str]
    tracebacks: list[str]


def classify(expected: Observed, found: Observed) -> str:
    """Return one of OUTCOMES, by the result and whether there was a new message to the user."""
    if found.traceback:
        return TRACEBACK
    if found.is_refused:
        return REFUSED
    is_told, is_equal = bool(set(found.messages) - set(expected.messages)), found.result == expected.result
    if is_told:
        return RECOVERED if is_equal else LEFT_OUT
    return HARMLESS if is_equal else UNNOTICED


def read_tree(folder: Path) -> dict[Path, bytes]:
    """Return the content of every file below a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def restore(folder: Path, tree: dict[Path, bytes]) -> None:
    """Undo all changes below a folder; unchanged files keep their times."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path not in tree:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for path, content in tree.items():
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def flip_all(case: Case, per_file: int, seed: int, listener: Listener) -> Iterator[Flips]:
    """Yield the outcomes of `per_file` flips of each file of a case."""
    tree, files = read_tree(case.folder), case.list_files()
    expected = observe(case, listener)
    restore(case.folder, tree)
    again = observe(case, listener)
    restore(case.folder, tree)
    is_read = not (expected.traceback or expected.is_refused)
    if not files or not is_read or classify(expected, again) != HARMLESS:
        raise UserError(f"{case.name} cannot be read twice with the same result: {expected}, {again}")
    for number, path in enumerate(files):
        name = path.relative_to(case.folder).as_posix()
        draw = random.Random(f"{seed} {case.name} {number}")
        flips = Flips(case.name, name, len(tree[path]), Counter(), [])
        for _ in range(per_file):
            damaged = bytearray(tree[path])
            damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
            path.write_bytes(damaged)
            found = observe(case, listener)
            flips.outcomes[classify(expected, found)] += 1
            if found.traceback:
                flips.tracebacks.append(found.traceback)
            restore(case.folder, tree)
        yield flips


def flip(per_file: int, seed: int = 0) -> list[Flips]:
    """Write the toy files, and damage and read each of them `per_file` times."""
    listener, logger, threads = Listener(), logging.getLogger(), torch.get_num_threads()
    cache = os.environ.get("MAE_BENCH_CACHE")
    logger.addHandler(listener)
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as temporary, small_caches():
            cases = build_cases(Path(temporary).resolve(), listener)
            return [flips for case in cases for flips in flip_all(case, per_file, seed, listener)]
    finally:
        logger.removeHandler(listener)
        torch.set_num_threads(threads)
        os.environ.pop("MAE_BENCH_CACHE", None)
        if cache is not None:
            os.environ["MAE_BENCH_CACHE"] = cache


def summarise(flips: list[Flips]) -> Table:
    """Return a row per file, and the sums."""
    rows: list[list[object]] = [
        [each.case, each.file, each.num_bytes, *(each.outcomes[name] for name in OUTCOMES)] for each in flips
    ]
    total: Counter[str] = sum((each.outcomes for each in flips), Counter())
    rows.append(["all", f"{len(flips)} files", "", *(total[name] for name in OUTCOMES)])
    return Table(
        "Flipped bytes",
        ["what is read", "file", "bytes", *OUTCOMES],
        rows,
        "Each flip changes one byte of one file, which is then read as in use: resumed, evaluated, reported. "
        "With a message to the user: `recovered`, computed again or taken from an earlier state, and the "
        "result is equal; `refused`, with what to do next; `left out` by name. Without a message: "
        "`harmless`, the result is equal; `unnoticed`, it differs.",
    )


def main() -> None:
    """Measure, print and write the table; exit with 1 if a flip was unnoticed or ended in a traceback."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    flipping = commands.add_parser("flip", help="flip single bytes of every file that is read back")
    flipping.add_argument("--per-file", type=positive_int, default=200, help="number of flips per file")
    flipping.add_argument("--seed", type=int, default=0, help="seed of the flips")
    flipping.add_argument("--out", type=Path, help="also write OUT.md and OUT.json")
    given = parser.parse_args()
    flips = flip(given.per_file, given.seed)
    write_table("Flipped bytes", [summarise(flips)], {"flips": [vars(each) for each in flips]}, given.out)
    for text in [text for each in flips for text in each.tracebacks][:MAX_SHOWN]:
        print(text, file=sys.stderr)
    if any(each.outcomes[name] for each in flips for name in (UNNOTICED, TRACEBACK)):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
