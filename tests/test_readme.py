"""The README says what is there: its file tree, its links and its tables.

`python tests/test_readme.py` writes the generated parts anew: the tree, from the first sentence of each module.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PACKAGES = ("mae_bench", "backbones", "tasks", "leaderboard")


def tree() -> str:
    """One line a module: its path and the sentence that it opens with."""
    lines = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                sentence = (
                    ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                ).splitlines()[0]
                lines.append(f"{path.relative_to(ROOT).as_posix():<36} {sentence}")
    return "\n".join(lines)


def block(name: str, text: str) -> str:
    """What stands between the markers of a generated part."""
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)\n?<!-- {name}:end -->", text, re.DOTALL)
    assert found, f"README.md has no block {name}"
    return found.group(1)


def test_tree_repeats_the_modules_sentences() -> None:
    assert tree() in block("tree", README.read_text(encoding="utf-8")), "run: python tests/test_readme.py"


def test_links_lead_somewhere() -> None:
    for page in (
        README,
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_tables_are_the_committed_ones() -> None:
    """Every score in the README's tables stands in the committed result that the block names."""
    text = README.read_text(encoding="utf-8")
    for name in ("demo", "small"):
        shown = block(name, text)
        folder = re.search(r"\(benchmarks/results/([\w.-]+)\)", shown)
        assert folder, f"the block {name} names no committed result"
        committed = (ROOT / "benchmarks" / "results" / folder.group(1) / "table.txt").read_text(
            encoding="utf-8"
        )
        table = re.search(r"```text\n(.*?)```", shown, re.DOTALL)
        assert table
        assert table.group(1).strip() in committed


def test_the_table_of_formats_is_the_codes() -> None:
    """Exactly the formats that are read, written as `convert` writes them, each with a test that names it."""
    from backbones.translating.detect import FORMATS, WRITABLE

    rows = re.findall(
        r"^\| `(\w+)` \| (.+) \| (folder|file|-) \| (.+): \[.+\]\((.+)\) \|$",
        README.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert sorted(name for name, *_ in rows) == sorted(FORMATS)
    as_written = {name: "file" if suffixes else "folder" for name, suffixes in WRITABLE.items()}
    assert {name: written for name, _, written, *_ in rows} == {
        name: as_written.get(name, "-") for name in FORMATS
    }
    for name, _, _, _, proof in rows:
        assert (
            f'"{name}"' in (ROOT / proof).read_text(encoding="utf-8") or Path(proof).stem == f"test_{name}"
        ), (name, proof)


def write() -> None:
    text = README.read_text(encoding="utf-8")
    begin, end = (text.index(f"<!-- tree:{mark} -->") for mark in ("begin", "end"))
    new = f"<details><summary>Every module in a sentence</summary>\n\n```text\n{tree()}\n```\n\n</details>\n"
    README.write_text(f"{text[:begin]}<!-- tree:begin -->\n{new}{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    write()
