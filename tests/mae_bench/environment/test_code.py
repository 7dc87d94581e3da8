"""The digest of the code: what changes it, what does not, and that every version of Python has the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mae_bench.environment.code import digest_code, digest_kind
from mae_bench.registry import KINDS

ROOT = Path(__file__).parents[3]
TASK = '''
"""A task."""

READER = "toy.reader"


def run(x):
    """Run."""
    from toy.lazy import power

    return power(x, f"{x!r:>{4}}")  # a comment
'''
SAME = """from typing import Any
READER = (
    'toy.reader'
)
def run(x):
    from toy.lazy import power
    return power(
        x,
        f"{x!r:>{4}}",
    )
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose task imports `lazy` in a function and names `reader` in a string."""
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "task.py").write_text(TASK)
    (folder / "lazy.py").write_text("import toy.deep\n\ndef power(x, y):\n    return x**2\n")
    (folder / "reader.py").write_text("import json\n")
    (folder / "deep.py").write_text("from toy import task\n")  # a circle
    (folder / "other.py").write_text("")
    return folder


def digest(package: Path) -> str:
    """Return the digest as another process finds it."""
    code = "from mae_bench.environment.code import digest_code; print(digest_code('toy.task'))"
    paths = os.pathsep.join([str(package.parent), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("task.py", TASK.replace("x!r", "x!s")),
        ("lazy.py", "import toy.deep\n\ndef power(x, y):\n    return x**3\n"),
        ("deep.py", "from toy import task\nEPS = 1e-6\n"),
        ("reader.py", "import json\nEPS = 1e-6\n"),
    ],
)
def test_a_change_of_what_a_task_imports_changes_its_digest(package: Path, file: str, text: str) -> None:
    before = digest(package)
    (package / file).write_text(text)
    assert digest(package) != before


def test_comments_docstrings_layout_and_other_modules_do_not(package: Path) -> None:
    (package / "task.py").write_text(TASK.replace("READER", "from typing import Any\nREADER", 1))
    before = digest(package)
    (package / "task.py").write_text(SAME)
    (package / "other.py").write_text("EPS = 1e-6\n")
    assert digest(package) == before


def find_python(version: str) -> str | None:
    """Return a Python of that version on the PATH or of pyenv; None if there is none."""
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for path in filter(None, found):
        done = subprocess.run([str(path), "-c", ""], capture_output=True)
        if done.returncode == 0:  # a shim of pyenv may fail
            return str(path)
    return None


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_every_version_of_python_has_the_same_digest(version: str) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"Python {version} is not installed")
    code = (
        "from mae_bench.environment.code import digest_kind; from mae_bench.registry import KINDS; "
        "print(*map(digest_kind, KINDS.values()))"
    )
    command = [python, "-S", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest_kind(kind) for kind in KINDS.values()]


def test_tasks_that_share_no_run_have_digests_of_their_own() -> None:
    digests = {name: digest_kind(kind) for name, kind in KINDS.items()}
    assert digests["pretrain"] == digests["random"], "both are made by one module"
    assert len(set(digests.values())) == len(KINDS) - 1


def test_a_module_that_is_missing_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        digest_code("no_such_module")
