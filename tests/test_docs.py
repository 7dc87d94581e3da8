"""README and docs match the code and the committed results: links, tables, the list of modules.

`python -m tests.test_docs` writes the generated parts: README's table of results, docs/modules.md, and the
badge of each page that quotes committed results: when they were measured, and whether with the current code.
"""

import ast
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from backbones.translating.detect import FORMATS, WRITABLE
from mae_bench.environment.code import digest_code, digest_kind
from mae_bench.record import read_record, write_record
from mae_bench.registry import KINDS
from mae_bench.suite.rows import rows_of

ROOT = Path(__file__).resolve().parent.parent
README, MODULES = ROOT / "README.md", ROOT / "docs" / "modules.md"
PACKAGES = ("mae_bench", "backbones", "tasks", "leaderboard")
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "benchmarks").rglob("*.md"),
]
RESULTS = "benchmarks/results"
COLUMNS = (  # heading, committed run, name of the cell, metric
    ("fine-tuning", "2026-11-21-protocols", "finetune", "top1"),
    ("linear probe", "2026-11-21-protocols", "linear", "top1"),
    ("kNN", "2026-11-21-protocols", "knn", "top1"),
    ("5 labels per class", "2026-11-21-protocols", "few_shot", "top1_5shot"),
    ("COCO", "2026-11-21-small", "maskrcnn", "AP_box"),
    ("segmentation", "2026-11-21-small", "upernet", "mIoU"),
)
# A badge: `<!-- measured FOLDER ... -->TEXT<!-- /measured -->`. No line begins with such a comment, because
# it would end the paragraph.
MEASURED = re.compile(r"(<!-- measured (\d[\w -]+) -->\s*)[^<]*?(\s*<!-- /measured -->)")
RESULT = re.compile(r"\bresults/(\d{4}-\d\d-\d\d-[\w-]+)")  # in a link


def render_results() -> str:
    """Return the table of committed scores: mean and sample deviation over seeds, linked to records."""
    heads = [f"[{name}]({RESULTS}/{run})<br>{metric}" for name, run, _, metric in COLUMNS]
    lines = [f"| backbone | {' | '.join(heads)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    for backbone in ("supervised", "mae", "random"):
        cells = []
        for _, run, task, metric in COLUMNS:
            paths = sorted((ROOT / RESULTS / run / "cells" / backbone).glob(f"{task}-s*/record.json"))
            records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            scores = [record["metrics"][metric]["value"] for record in records]
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            link = paths[0].relative_to(ROOT).as_posix()
            cells.append(f"[{statistics.mean(scores):.1f}{spread}]({link})")
        lines.append(f"| {backbone} | {' | '.join(cells)} |")
    lines += [
        "",
        "Mean ± sample deviation over 3 transfer seeds; no deviation: one seed. Links lead to a record each.",
    ]
    return "\n".join(lines)


def render_modules() -> str:
    """Return each module's path and the first sentence of its docstring."""
    lines = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                sentence = " ".join(docstring.split("\n\n")[0].split())
                name = path.relative_to(ROOT).as_posix()
                lines.append(f"- [`{name}`](../{name}): {sentence}")
    return "\n".join(lines)


def render_measured(runs: str) -> str:
    """Return when the results in some folders were measured, and whether any was with earlier code."""
    dates, is_current = set(), True
    for folder in (ROOT / RESULTS / run for run in runs.split()):
        for path in folder.rglob("record.json"):
            record = read_record(path)
            dates.add(record.finished[:10])
            kind = KINDS.get(record.config["kind"])
            is_current = is_current and kind is not None and record.code_digest == digest_kind(kind)
        for path in folder.glob("*.json"):
            where = json.loads(path.read_text(encoding="utf-8")).get("environment")
            if where:  # of a benchmark
                dates.add(where["date"][:10])
                is_current = is_current and where.get("code") == digest_code(where["command"].split()[2])
    first, last = min(dates), max(dates)
    when = first if first == last else f"{first} to {last}"
    return f"measured {when}" if is_current else f"measured {when} with earlier code"


def write_measured(text: str) -> str:
    """Return the text of a page with what `render_measured` returns in each place that asks for it."""
    return MEASURED.sub(lambda found: f"{found[1]}{render_measured(found[2])}{found[3]}", text)


GENERATED = {("results", README): render_results, ("tree", MODULES): render_modules}


@pytest.mark.parametrize(("name", "page"), GENERATED, ids=lambda value: getattr(value, "name", value))
def test_generated_parts_are_current(name: str, page: Path) -> None:
    found = re.search(
        rf"<!-- {name}:begin -->\n(.*?)\n?<!-- {name}:end -->", page.read_text("utf-8"), re.DOTALL
    )
    assert found
    assert found[1].strip() == GENERATED[name, page](), "run: python -m tests.test_docs"


def test_quoted_results_state_when_and_with_which_code_they_were_measured() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert write_measured(text) == text, f"{page.name} is not current: run python -m tests.test_docs"
        assert not re.search(r"^\s*<!-- /?measured", text, re.MULTILINE), page.name
        if ROOT / RESULTS not in page.parents:
            stated = {run for found in MEASURED.finditer(text) for run in found[2].split()}
            assert set(RESULT.findall(text)) <= stated, f"{page.name} quotes results without their date"


def test_results_of_the_current_code_are_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = read_record(next((ROOT / RESULTS / "2026-11-21-protocols").rglob("mae/knn-s0*/record.json")))
    new = replace(old, finished="2027-01-02T03:04:05+00:00", code_digest=digest_kind(KINDS["knn"]))
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for run, records in {"1-old": [old], "2-new": [new], "3-both": [new, old]}.items():
        for i, record in enumerate(records):
            write_record(record, tmp_path / RESULTS / run / "cells" / str(i) / "record.json")
    page = "before, <!-- measured {} -->\n{}<!-- /measured -->, after"
    for run, stated in {
        "1-old": "measured 2026-11-21 with earlier code",
        "2-new": "measured 2027-01-02",
        "3-both": "measured 2026-11-21 to 2027-01-02 with earlier code",
        "1-old 2-new": "measured 2026-11-21 to 2027-01-02 with earlier code",
    }.items():
        assert write_measured(page.format(run, "by hand")) == page.format(run, stated)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is missing"


def test_the_readme_fits_on_two_screens() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 12_000
    assert len(re.findall(r"!\[[^\]]+\]\([^)]+\)", text)) >= 3
    assert "make demo" in text
    assert "make test" in text
    prose = re.sub(r"<!-- results:begin -->.*<!-- results:end -->", "", text, flags=re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > 110 and not line.startswith(("![", "|"))]
    assert not long


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_table_of_formats_is_the_codes() -> None:
    """Exactly the formats that are read, written as `convert` writes them, each with a test that names it."""
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| (.+) \| (folder|file|-) \| (.+): \[.+\]\((.+)\) \|$", text, re.MULTILINE
    )
    assert sorted(name for name, *_ in rows) == sorted(FORMATS)
    as_written = {name: "file" if suffixes else "folder" for name, suffixes in WRITABLE.items()}
    assert {name: written for name, _, written, *_ in rows} == {
        name: as_written.get(name, "-") for name in FORMATS
    }
    for name, _, _, _, proof in rows:
        path = ROOT / "docs" / proof
        assert f'"{name}"' in path.read_text(encoding="utf-8") or path.stem == f"test_{name}", (name, proof)


def test_the_list_of_checkpoints_on_its_page_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"```yaml run\n(.*?)```", page, re.DOTALL)
    (tmp_path / "list.yaml").write_text(listed)
    assert list(rows_of([str(tmp_path / "list.yaml")]))[:2] == ["mae_vit_base", "dino-ours"]


def write() -> None:
    for (name, page), render in GENERATED.items():
        text = page.read_text(encoding="utf-8")
        begin, end = (text.index(f"<!-- {name}:{mark} -->") for mark in ("begin", "end"))
        page.write_text(f"{text[:begin]}<!-- {name}:begin -->\n{render()}\n{text[end:]}", encoding="utf-8")
    for page in PAGES:
        page.write_text(write_measured(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
