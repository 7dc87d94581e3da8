"""Doctor: what it finds here, and what it says of what is missing or broken."""

from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from mae_bench.environment import doctor
from mae_bench.registry import EXTRAS, Extra


def shown() -> str:
    text = StringIO()
    Console(file=text, width=300).print(doctor.render(doctor.examine()))
    return text.getvalue()


def test_a_whole_installation() -> None:
    found = doctor.examine()
    assert found["problems"] == []
    assert found["versions"]["torch"]
    assert found["disk"]["free_gib"] > 0
    assert "The core works." in shown()


def test_a_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_bench.registry.find_spec", lambda name: None)
    found = doctor.examine()
    assert found["extras"]["coco"]["missing"] == ["detectron2", "pycocotools", "shapely"]
    assert found["extras"]["coco"]["command"].startswith("make setup")
    assert "detectron2, pycocotools, shapely missing" in shown()
    assert found["problems"] == [], "the core does without"


def test_an_extra_whose_system_library_is_missing_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(EXTRAS, "ade20k", Extra(("json",), "segmentation", "make setup", compiled=("needy",)))
    extra = doctor.examine()["extras"]["ade20k"]
    assert not extra["installed"]
    assert extra["broken"] == ["needy: ImportError: libGL.so.1: cannot open shared object file"]
    assert "broken (needy: ImportError: libGL.so.1" in shown()
    assert "apt-get install libgl1" in shown()


def test_two_distributions_of_one_module_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0")
    found = doctor.examine()
    assert found["problems"] == [
        "two distributions own the module detectron2: sal-detectron2 1.0 and detectron2 1.0"
    ]
    assert found["fix"].startswith("python -m pip uninstall sal-detectron2 ")


def test_a_broken_core_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "IMPORTED", ("no_such_module",))
    monkeypatch.setattr(doctor, "PACKAGES", ("no_such_part",))
    monkeypatch.setattr(doctor, "CORE", ("mae_bench", "no-such-distribution"))
    monkeypatch.setattr("sys.version_info", type("V", (tuple,), {"major": 3, "minor": 10})((3, 10, 0)))
    problems = doctor.core_problems()
    assert problems[0] == "no-such-distribution is not installed"
    assert "no_such_part" in problems[1]
    assert "3.10" in problems[2]
    assert "no_such_module does not import" in problems[3]


@pytest.mark.parametrize(
    ("distribution", "route"),
    [
        ("sal-detectron2", "wheel that needs no compiler"),
        ("detectron2", "build of the upstream repository"),
        ("", "unknown"),
    ],
)
@pytest.mark.parametrize("built", [True, False])
def test_which_detectron2_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str, route: str, built: bool
) -> None:
    spec = ModuleSpec("detectron2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(doctor, "find_spec", lambda name: spec)
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0" if name == distribution else "")
    (tmp_path / "_C.cpython-39-other.so").write_text("for another Python")
    if built:
        (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").write_text("")
    found = doctor.detectron2()
    assert (found["route"], found["distribution"], found["extension"]) == (route, distribution, built)


def test_no_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.detectron2() == {"installed": False}
