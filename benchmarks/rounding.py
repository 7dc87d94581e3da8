"""Scores of miniature probes under other kernels: rounding must move them less than the seed does.

The same cells run three times: as they are, with the kernels that PyTorch has for any processor
(ATEN_CPU_CAPABILITY=default), and with those of MKL that round alike on all processors
(MKL_CBWR=COMPATIBLE).
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Table, positive_int, run_main, write_table
from mae_bench.errors import UserError
from mae_bench.record import RECORD_FILE, read_record

SETTINGS: dict[str, dict[str, str]] = {
    "plain": {},
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "MKL_CBWR=COMPATIBLE": {"MKL_CBWR": "COMPATIBLE"},
}
MAX_SHARE = 1 / 3  # of the standard deviation over seeds, which the gap between kernels has to stay below
PRETRAINING = "pretrain"

Scores = dict[str, dict[int, float]]  # protocol -> seed -> main metric


def run_suite(args: argparse.Namespace, setting: dict[str, str], out: Path) -> Scores:
    """Run `mae-bench evaluate` in an environment with `setting`, and return its scores."""
    command = [sys.executable, "-P", "-m", "mae_bench", "evaluate", "--checkpoint", args.checkpoint]
    command += ["--tasks", args.tasks, "--out", str(out), "--jobs", "1"]
    command += [f"data.imagenet={args.data}", f"seeds={list(range(args.seeds))}", "device=cpu"]
    done = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"mae-bench evaluate ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}",
            expected="scores of every cell",
        )
    scores: Scores = {}
    for path in sorted(out.rglob(RECORD_FILE)):
        record = read_record(path)
        if record.task != PRETRAINING:
            scores.setdefault(record.protocol, {})[record.seed] = record.score.value
    return scores


def build_rows(scores: dict[str, Scores]) -> list[list[object]]:
    """Return a row per protocol: scores, spread over seeds, largest gap of a seed, and the verdict."""
    rows: list[list[object]] = []
    for protocol, plain in scores["plain"].items():
        values = [found[protocol] for found in scores.values()]
        gaps = [max(of[seed] for of in values) - min(of[seed] for of in values) for seed in plain]
        spread = statistics.stdev(plain.values())
        listed = ", ".join(f"{value:.2f}" for value in plain.values())
        verdict = "yes" if max(gaps) <= MAX_SHARE * spread else "no"
        rows.append([protocol, listed, f"{spread:.3f}", f"{max(gaps):.3f}", verdict])
    return rows


def main() -> None:
    """Run the cells under every setting and write the table."""
    args = _parse_arguments()
    with TemporaryDirectory() as folder:
        scores = {
            name: run_suite(args, setting, Path(folder) / str(number))
            for number, (name, setting) in enumerate(SETTINGS.items())
        }
    note = (
        "Scores are the main metric of the plain run, one per seed. The gap is the largest difference of one "
        f"seed's score between {', '.join(SETTINGS)}. It has to stay below a third of the standard deviation."
    )
    header = ["protocol", "scores (%)", "sd over seeds", "largest gap", "below a third"]
    table = Table("Scores under other kernels", header, build_rows(scores), note)
    write_table("Rounding and the miniature probes", [table], {"scores": scores}, args.out)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="SOURCE of a ViT, such as run:FOLDER")
    parser.add_argument("--data", required=True, help="folder in the ImageNet layout")
    parser.add_argument("--tasks", required=True, help="comma-separated, such as imagenet/linear_small")
    parser.add_argument("--seeds", type=positive_int, default=5, help="number of seeds, two or more")
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
