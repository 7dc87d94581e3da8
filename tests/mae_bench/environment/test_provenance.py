"""Provenance: versions without imports, the commit of the checkout, the machine."""

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from mae_bench.environment import provenance


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_the_commit_is_named_and_a_change_shows(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "notes.txt").write_text("not tracked, so not code")
    assert provenance.git_hash(checkout / "code.py") == commit
    (checkout / "code.py").write_text("2")
    assert provenance.git_hash(checkout / "code.py") == f"{commit}-dirty"


def test_a_package_installed_inside_a_strangers_checkout_has_no_commit(
    checkout: Path, tmp_path: Path
) -> None:
    (checkout / "venv").mkdir()
    (checkout / "venv" / "package.py").write_text("")
    assert provenance.git_hash(checkout / "venv" / "package.py") == ""
    assert provenance.git_hash("/nowhere/file.py") == ""


def test_versions_are_read_without_importing() -> None:
    code = (
        "import sys\n"
        "from mae_bench.environment.provenance import versions, hardware\n"
        "found = versions(); hardware()\n"
        "assert found['torch'] and found['timm'] and found['mae_bench'] and found['python'], found\n"
        "print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert provenance.version_of("no-such-distribution") == ""


def test_hardware_and_time() -> None:
    machine = provenance.hardware()
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0
    assert machine["cpu"]
    assert datetime.fromisoformat(provenance.now()).utcoffset() is not None


def test_the_command_is_quoted_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/bin/mae-bench", "run", "a b.yaml", "seeds=[0,1]"])
    assert provenance.command_line() == "mae-bench run 'a b.yaml' 'seeds=[0,1]'"


def test_no_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "GPU_NODES", ("/nowhere",))
    assert provenance.visible_gpus() == []
