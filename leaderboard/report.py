"""Build the report of a folder of runs, and write it as Markdown, CSV, JSON and HTML."""

from collections.abc import Callable, Collection
from pathlib import Path

from leaderboard import (
    ablation,
    charts,
    costs,
    curve,
    gallery,
    metrics,
    provenance,
    published,
    remarks,
    scores,
)
from leaderboard.compare import compare
from leaderboard.index import Runs, load_runs
from leaderboard.render.csv import render_csv
from leaderboard.render.files import write_texts
from leaderboard.render.html import render_html
from leaderboard.render.json import render_json
from leaderboard.render.markdown import render_markdown
from leaderboard.sections import Report, Results, Section

TITLE = "mae_bench leaderboard"
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (  # in reading order
    remarks.build_problems,
    scores.build_section,
    ablation.build_section,
    curve.build_section,
    remarks.build_failures,
    remarks.build_verdicts,
    remarks.build_notes,
    charts.build_section,
    metrics.build_section,
    gallery.build_section,
    costs.build_total_section,
    costs.build_run_section,
    provenance.build_code_section,
    provenance.build_section,
    published.build_section,
)


def load_results(
    runs_dir: str | Path, baseline: str = "supervised", only: Collection[Path] | None = None
) -> Results:
    """Load and compare the runs below a folder. `only` as in load_runs; RecordError if there are none."""
    runs = load_runs(runs_dir, only)
    return Results(runs, compare(runs, baseline))


def build_report(results: Results, title: str = TITLE) -> Report:
    """Build every section that has something to show."""
    sections = [build(results) for build in SECTIONS]
    return Report(title, _write_lead(results), tuple(section for section in sections if section))


def _write_lead(results: Results) -> str:
    return (
        "Pretrained backbones transferred to image classification, object detection and semantic "
        f"segmentation under the same protocols. The baseline is {results.comparison.baseline}. "
        f"{_describe_extent(results.runs)}"
    )


def _describe_extent(runs: Runs) -> str:
    """Return the number of records, and when they were measured."""
    dates = sorted(run.record.finished[:10] for run in runs.records if run.record.finished)
    count = f"{len(runs.records)} records"
    if not dates:
        return f"{count}."
    last = f" to {dates[-1]}" if dates[-1] != dates[0] else ""
    return f"{count}, measured {dates[0]}{last}."


def write_report(
    runs_dir: str | Path,
    out_dir: str | Path,
    baseline: str = "supervised",
    title: str = TITLE,
    only: Collection[Path] | None = None,
) -> list[Path]:
    """Write `leaderboard.md`, `.csv`, `.json` and `.html` to a folder and return their paths.

    only: as in load_runs. RecordError is raised if there are no runs, or if the folder cannot be written.
    """
    results = load_results(runs_dir, baseline, only)
    return write_files(results, build_report(results, title), out_dir)


def write_files(results: Results, report: Report, out_dir: str | Path) -> list[Path]:
    """Write a report that is already built, as `write_report` does."""
    texts = {
        "leaderboard.md": render_markdown(report),
        "leaderboard.csv": render_csv(results.comparison),
        "leaderboard.json": render_json(results.comparison, report.title),
        "leaderboard.html": render_html(report),
    }
    return write_texts(out_dir, texts)
