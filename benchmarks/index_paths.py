"""Time to list a set of a million paths: first start, later starts, and torchvision's ImageFolder."""

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

from benchmarks.measure import Table, positive_int, run_main, write_table
from mae_bench.data.sets.index import SETTLED_SECONDS
from mae_bench.errors import UserError

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
    "check": checked - began, "open": opened - checked, "cpu": cpu, "images": len(images), "pickled":
        len(pickle.dumps(images)),
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


def make_tree(root: Path, num_classes: int, images_per_class: int) -> None:
    """Create root/train/CLASS/NAME.JPEG (empty files), and root/val with 50 per class."""
    for split, count in (("train", images_per_class), ("val", 50)):
        for number in range(num_classes):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                os.close(os.open(folder / f"{folder.name}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))


def measure(script: str, root: Path, cache: Path) -> dict[str, float]:
    """Measure one start in a new process; seconds exclude imports."""
    command = [sys.executable, "-c", script, str(root)]
    output = subprocess.check_output(command, env=os.environ | {"MAE_BENCH_CACHE": str(cache)})
    return dict(json.loads(output))


def take_medians(starts: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each value."""
    return {key: statistics.median(start[key] for start in starts) for key in starts[0]}


def format_row(name: str, found: dict[str, float]) -> list[str]:
    """Return one row of the table."""
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
    """Create the tree, measure in separate processes, print the table and remove the tree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=positive_int, default=1000)
    parser.add_argument(
        "--images-a-class",
        dest="images_per_class",
        type=positive_int,
        default=1000,
        help="in train; val has 50 per class, as ImageNet",
    )
    parser.add_argument(
        "--starts", type=positive_int, default=3, help="starts with the cache, and of the peer (medians)"
    )
    parser.add_argument("--folder", type=Path, help="where the tree is created; it is removed at the end")
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    args = parser.parse_args()
    if args.folder and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder}", expected="an existing folder")
    place = Path(tempfile.mkdtemp(prefix="index_paths_", dir=args.folder))
    try:
        make_tree(place / "set", args.classes, args.images_per_class)
        time.sleep(SETTLED_SECONDS + 1)
        first = measure(OURS, place / "set", place / "cache")
        later = [measure(OURS, place / "set", place / "cache") for _ in range(args.starts)]
        peers = [measure(PEER, place / "set", place / "cache") for _ in range(args.starts)]
        report(first, later, peers, args.out)  # before the removal, which may take longer than all else
    finally:
        shutil.rmtree(place)


def report(
    first: dict[str, float], later: list[dict[str, float]], peers: list[dict[str, float]], out: Path | None
) -> None:
    """Print the table, and write it to `out` if given."""
    rows = [
        format_row("first start", first),
        format_row("next start, with the index in the cache", take_medians(later)),
        format_row("torchvision ImageFolder, each start", take_medians(peers)),
    ]
    header = [
        "",
        "check the layout and its digest, s",
        "open train, s",
        "CPU time of both, s",
        "memory of the process, MiB",
        "pickled for a worker, bytes",
    ]
    note = f"{int(first['images']):,} images in train, just created and cached. Seconds exclude imports."
    data = {"first": first, "next": later, "peer": peers}
    write_table("Listing a million paths", [Table("Starts", header, rows, note)], data, out)


if __name__ == "__main__":
    run_main(main)
