"""The suite is collected the same every time: parallel workers must agree on the list of tests."""

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_another_process_collects_the_same_tests(request: pytest.FixtureRequest) -> None:
    """Another hash seed orders sets differently, and another second changes whatever contains the time."""
    config = request.config
    selection = ["-m", config.option.markexpr, "-k", config.option.keyword]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *selection, *config.args],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=config.invocation_params.dir,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    ids = [line for line in found.stdout.splitlines() if "::" in line]
    assert ids == [item.nodeid for item in request.session.items]


def test_ids_contain_no_data(request: pytest.FixtureRequest) -> None:
    """Bytes and texts of several lines are named after their parameter (conftest.py)."""
    escaped = re.compile(r"(?<!\\)\\[xn]")
    assert [item.nodeid for item in request.session.items if escaped.search(item.nodeid)] == []
