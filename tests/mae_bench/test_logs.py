"""Logs that frameworks write go to the job's file and nowhere else, and only for as long as they should."""

import logging
import warnings
from pathlib import Path

import pytest

from mae_bench.logs import log_to


def test_prints_warnings_and_logs_go_to_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, framework = tmp_path / "log", logging.getLogger("framework")
    path.write_text("before\n")
    with log_to(path, "framework"):
        print("printed")
        warnings.warn("warned", stacklevel=1)
        framework.info("informed")
        logging.getLogger("mae_bench.data").warning("skipped")
    text = path.read_text()
    assert all(
        word in text
        for word in (
            "before",
            "printed",
            "warned",
            "framework INFO: informed",
            "mae_bench.data WARNING: skipped",
        )
    )
    assert "".join(capfd.readouterr()) == ""


def test_all_is_as_before_even_after_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    framework = logging.getLogger("framework")
    before = (framework.level, framework.propagate, list(framework.handlers))
    with pytest.raises(KeyError), log_to(tmp_path / "log", "framework"):
        raise KeyError
    assert (framework.level, framework.propagate, framework.handlers) == before
    print("heard")
    assert capfd.readouterr().out == "heard\n"
    assert (tmp_path / "log").read_text() == ""
