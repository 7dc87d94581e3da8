"""The rules of the source: who may import whom, no cycles, one sentence per module, strict loading."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mae_bench", "backbones", "tasks", "leaderboard", "configs")
MAY_IMPORT = {  # inside functions too; only the command line may import upwards
    "mae_bench": {"mae_bench"},
    "backbones": {"backbones", "mae_bench"},
    "tasks": {"tasks", "backbones", "mae_bench"},
    "leaderboard": {"leaderboard"},
    "configs": set(),
}
COMMAND_LINE = ("mae_bench.cli", "mae_bench.__main__")
SHARED = (  # all that the leaderboard may import from the core
    "mae_bench.record",
    "mae_bench.intervals",
    "mae_bench.errors",
    "mae_bench.files",
    "mae_bench.spec",
)
FAMILIES_SHARE = ("tasks.context", "tasks.states", "tasks.trained")  # what several task families import
FRAMEWORKS = {"detectron2", "mmseg", "mmengine", "mmcv"}
FRAMEWORK_PLACES = ("backbones.adapters.", "tasks.coco.", "tasks.ade20k.")
STANDARD_LIBRARY_ONLY = (
    "mae_bench",
    "mae_bench.errors",
    "mae_bench.spec",
    "mae_bench.record",
    "mae_bench.files",
    "mae_bench.seal",
    "mae_bench.registry",
)
NAMELESS = {"utils", "util", "helpers", "misc", "common"}
LONGEST_FUNCTION = 60  # lines; the median should be near 10


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def read_modules(root: Path) -> dict[str, ast.Module]:
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {module_name(path, root): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every imported name (for `from a import b` both a and a.b), also inside functions.

    Imports under `if TYPE_CHECKING` are left out.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        else:
            yield from imports(node)


def violations(modules: dict[str, ast.Module]) -> list[str]:
    """Every rule that a set of modules breaks, as sentences."""
    return [
        *(found for name, tree in modules.items() for rule in RULES for found in rule(name, tree)),
        *cycles(modules),
    ]


def is_command_line(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in COMMAND_LINE)


def floors(name: str, tree: ast.Module) -> Iterator[str]:
    here = name.split(".")[0]
    if is_command_line(name):
        return
    for target in imports(tree):
        there = target.split(".")[0]
        record = here == "leaderboard" and any(
            target == shared or target.startswith(f"{shared}.") for shared in SHARED
        )
        if there in PACKAGES and there not in MAY_IMPORT[here] and not record:
            yield f"{name} imports {target} against the floors"
        if target.startswith("."):
            yield f"{name} imports {target} relatively"
        if is_command_line(target):
            yield f"{name} imports the command line"


def siblings(name: str, tree: ast.Module) -> Iterator[str]:
    """Task families never import one another; what they share is in FAMILIES_SHARE."""
    family = name.split(".")[1:2]
    for target in imports(tree):
        if any(target == shared or target.startswith(f"{shared}.") for shared in FAMILIES_SHARE):
            continue
        if name.startswith("tasks.") and target.startswith("tasks.") and target.split(".")[1:2] != family:
            yield f"{name} imports its sibling {target}"


def frameworks(name: str, tree: ast.Module) -> Iterator[str]:
    for target in imports(tree):
        if target.split(".")[0] in FRAMEWORKS and not name.startswith(FRAMEWORK_PLACES):
            yield f"{name} imports the framework {target}"
        third_party = target.split(".")[0] in {
            "torch",
            "numpy",
            "pydantic",
            "timm",
            "PIL",
            "omegaconf",
            "rich",
        }
        if name in STANDARD_LIBRARY_ONLY and third_party:
            yield f"{name} imports {target}, and not only the standard library"


def sentence(name: str, tree: ast.Module) -> Iterator[str]:
    """An `__init__` is empty, but for the package's API: a table of strings that are imported when asked for.

    Any other module opens with one sentence on its own."""
    is_package = (ROOT / name.replace(".", "/") / "__init__.py").is_file()
    if is_package and tree.body and not (name == "mae_bench" and is_lazy_api(tree)):
        yield f"{name}/__init__.py is not empty"
    first = (ast.get_docstring(tree) or "").split("\n\n")[0]
    if not is_package and not (first.endswith(".") and " " in first):
        yield f"{name} does not open with a sentence: {first!r}"
    if name.rpartition(".")[2] in NAMELESS:
        yield f"{name} has a name that says nothing"


def is_lazy_api(tree: ast.Module) -> bool:
    """Whether the body is imports, one table, `__getattr__` and `__dir__`: all is loaded on first use."""
    kinds = [type(node) for node in tree.body if not isinstance(node, ast.ImportFrom)]
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return kinds == [ast.Assign, ast.FunctionDef, ast.FunctionDef] and functions == ["__getattr__", "__dir__"]


def careless(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.keyword)
            and isinstance(node.value, ast.Constant)
            and node.value.value is False
        ):
            call = f"{name}:{node.value.lineno}"
            if node.arg == "weights_only":
                yield f"{call} unpickles a file"
            if node.arg == "strict" and not _is_of_no_weights(node, tree):
                yield f"{call} loads weights without looking at their keys"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{name}:{node.lineno} catches everything"
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION:
            yield f"{name}:{node.lineno} {node.name} is longer than {LONGEST_FUNCTION} lines"


def _is_of_no_weights(keyword: ast.keyword, tree: ast.Module) -> bool:
    """`zip(..., strict=False)`, and simplejpeg's way of saying that a warning is no error."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and keyword in node.keywords]
    return all(ast.unparse(call) in ("zip", "simplejpeg.decode_jpeg") for call in calls)


def cycles(modules: dict[str, ast.Module]) -> Iterator[str]:
    graph = {name: {t for t in imports(tree) if t in modules} for name, tree in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"modules in a circle: {' -> '.join(error.args[1])}"


RULES = (floors, siblings, frameworks, sentence, careless)


def test_the_source_keeps_the_rules() -> None:
    modules = read_modules(ROOT)
    assert len(modules) > 40
    found = violations(modules)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("mae_bench.planted", "from tasks.coco import maskrcnn", "against the floors"),
        ("mae_bench.planted", "def f():\n    import leaderboard.compare", "against the floors"),
        ("backbones.planted", "import tasks.imagenet.finetune", "against the floors"),
        ("leaderboard.planted", "from mae_bench.config import build", "against the floors"),
        ("leaderboard.planted", "from mae_bench.recorder import x", "against the floors"),
        ("tasks.planted", "from leaderboard.table import Cell", "against the floors"),
        ("tasks.coco.planted", "from tasks.ade20k.data import x", "its sibling"),
        ("tasks.context", "from tasks.coco.data import x", "its sibling"),
        ("mae_bench.planted", "from mae_bench.cli.app import main", "imports the command line"),
        ("mae_bench.planted", "from . import config", "relatively"),
        ("mae_bench.planted", "import detectron2.modeling", "the framework"),
        ("tasks.imagenet.planted", "def f():\n    from mmengine import Config", "the framework"),
        ("mae_bench.record", "import numpy as np", "not only the standard library"),
        ("mae_bench.data.utils", "", "a name that says nothing"),
        ("mae_bench.planted", "model.load_state_dict(x, strict=False)", "without looking"),
        ("mae_bench.planted", "torch.load(x, weights_only=False)", "unpickles"),
        ("mae_bench.planted", "try:\n    f()\nexcept:\n    pass", "catches everything"),
        ("mae_bench.planted", "def f():\n" + "    x = 1\n" * 80, "longer than"),
    ],
)
def test_a_planted_violation_is_found(name: str, source: str, message: str) -> None:
    found = violations({name: ast.parse(f'"""A module."""\n{source}')})
    assert [sentence for sentence in found if message in sentence], found


@pytest.mark.parametrize(
    "source", ["", "'''no sentence'''", "import os", "'''Two\n\nparts.'''", "'''Name.'''"]
)
def test_a_module_without_its_sentence_is_found(source: str) -> None:
    assert "does not open with a sentence" in violations({"mae_bench.planted": ast.parse(source)})[0]


def test_a_full_init_and_a_circle_are_found() -> None:
    text = '"""A module."""\n'
    assert "is not empty" in violations({"mae_bench.data": ast.parse(text)})[0]
    assert "is not empty" in violations({"mae_bench": ast.parse(f"{text}run()")})[0]
    circle = {
        "mae_bench.a": ast.parse(f"{text}import mae_bench.b"),
        "mae_bench.b": ast.parse(f"{text}from mae_bench.a import x"),
    }
    assert violations(circle) == ["modules in a circle: mae_bench.a -> mae_bench.b -> mae_bench.a"]
    circle["mae_bench.b"] = ast.parse(f"{text}def f():\n    from mae_bench.a import x")
    assert violations(circle) == [
        "modules in a circle: mae_bench.a -> mae_bench.b -> mae_bench.a"
    ]  # a lazy one too


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("leaderboard.planted", "from mae_bench.record import ResultRecord"),
        ("tasks.coco.planted", "import detectron2\nfrom backbones.load import load_backbone"),
        ("tasks.coco.planted", "from tasks.context import TaskContext"),
        ("mae_bench.cli.suites", "def report():\n    from leaderboard.report import write_report"),
        (
            "mae_bench.planted",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mae_bench.planted import x",
        ),
        ("mae_bench.planted", "pairs = zip(a, b, strict=False)"),
    ],
)
def test_what_is_allowed_is_not_found(name: str, source: str) -> None:
    assert violations({name: ast.parse(f'"""A module."""\n{source}')}) == []


def test_tests_have_no_packages() -> None:
    """A `tests/tasks/__init__.py` would shadow the real `tasks`."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
