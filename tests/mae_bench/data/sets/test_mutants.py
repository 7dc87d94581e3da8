"""Damaged files of every form of image set are refused, or read as they are; nothing crashes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow, for Arrow and Parquet sets, is not installed")

from tests.mae_bench.data.sets.mutants import FORMS, SEALED

NUM_MUTANTS = int(os.environ.get("NUM_MUTANTS", "25"))  # of each form
OUTCOMES = {"same", "refused", "bad image", "other content"}


def test_damage_is_named_and_crashes_nothing(cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mae_bench.data.sets.mutants", str(NUM_MUTANTS), "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = Counter(tuple(json.loads(line)) for line in done.stdout.splitlines())
    assert done.returncode == 0, (done.returncode, list(found)[-1:], done.stderr[-2000:])
    assert {outcome for _, outcome in found} <= OUTCOMES, found
    for form in FORMS:
        assert sum(found[form, outcome] for outcome in OUTCOMES) == NUM_MUTANTS
        assert found[form, "refused"] + found[form, "bad image"] > 0, form
    for form in SEALED:
        assert found[form, "bad image"] == found[form, "other content"] == 0, form
