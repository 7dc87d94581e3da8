"""Measures how long a set of a million paths takes to be listed: the first start, the next one, and torchvision's ImageFolder."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Table, write_table
from mae_bench.data.sets.index import SETTLED_SECONDS

OURS = """
import json, pickle, resource, sys, time
from mae_bench.data.sets.open import open_images
from mae_bench.data.checks.layouts import check_layout
began, cpu = time.perf_counter(), time.process_time()
check_layout("imagenet", sys.argv[1])
checked = time.perf_counter()
images = open_images(sys.argv[1], "train")
opened, cpu = time.perf_counter(), time.process_time() - cpu
images.name(len(images) - 1), images.targets[-1]
print(json.dumps({
    "check": checked - began, "open": opened - checked, "cpu": cpu, "images": len(images), "pickled": len(pickle.dumps(images)),
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""
PEER = """
import json, pickle, resource, sys, time
from torchvision.datasets import ImageFolder
began, cpu = time.perf_counter(), time.process_time()
images = ImageFolder(sys.argv[1] + "/train")
opened, cpu = time.perf_counter(), time.process_time() - cpu
print(json.dumps({
    "open": opened - began, "cpu": cpu, "images": len(images), "pickled": len(pickle.dumps(images)),
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def make_tree(root: Path, num_classes: int, images_a_class: int) -> None:
    """root/train/CLASS/NAME.JPEG (empty files), and root/val with 50 a class."""
    for split, count in (("train", images_a_class), ("val", 50)):
        for number in range(num_classes):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                os.close(os.open(folder / f"{folder.name}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))


def measure(script: str, root: Path, cache: Path) -> dict[str, float]:
    """One start in a process of its own; seconds without the imports."""
    command = [sys.executable, "-c", script, str(root)]
    return json.loads(subprocess.check_output(command, env=os.environ | {"MAE_BENCH_CACHE": str(cache)}))


def median(starts: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {key: statistics.median(start[key] for start in starts) for key in starts[0]}


def row(name: str, found: dict[str, float]) -> list[str]:
    """One line of the table."""
    check = f"{found['check']:.2f}" if "check" in found else "-"
    return [
        name,
        check,
        f"{found['open']:.3f}",
        f"{found['cpu']:.2f}",
        f"{found['memory']:.0f}",
        f"{int(found['pickled']):,}",
    ]


def main() -> None:
    """Makes the tree, measures in processes of their own, removes the tree and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument(
        "--images-a-class", type=int, default=1000, help="in train; val has 50 a class, as ImageNet"
    )
    parser.add_argument(
        "--starts", type=int, default=3, help="starts with the cache, and of the peer; their medians count"
    )
    parser.add_argument("--folder", type=Path, help="where the tree is made; it is removed at the end")
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="index_paths_", dir=args.folder))
    try:
        make_tree(place / "set", args.classes, args.images_a_class)
        time.sleep(SETTLED_SECONDS + 1)
        first = measure(OURS, place / "set", place / "cache")
        later = [measure(OURS, place / "set", place / "cache") for _ in range(args.starts)]
        peers = [measure(PEER, place / "set", place / "cache") for _ in range(args.starts)]
        report(first, later, peers, args.out)  # to remove a million files may take longer than all of it
    finally:
        shutil.rmtree(place)


def report(
    first: dict[str, float], later: list[dict[str, float]], peers: list[dict[str, float]], out: Path | None
) -> None:
    """Prints the table, and writes it if asked."""
    rows = [
        row("first start", first),
        row("next start, with the index in the cache", median(later)),
        row("torchvision ImageFolder, each start", median(peers)),
    ]
    header = [
        "",
        "check the layout and its digest, s",
        "open train, s",
        "CPU time of both, s",
        "memory of the process, MiB",
        "pickled for a worker, bytes",
    ]
    note = f"{int(first['images']):,} images in train, just made, so in the system's memory. Seconds without the imports."
    data = {"first": first, "next": later, "peer": peers}
    write_table("Listing a million paths", [Table("Starts", header, rows, note)], data, out)


if __name__ == "__main__":
    main()
