"""Writes the leaderboard of a folder of runs as Markdown, CSV, JSON and HTML."""

import os
from collections.abc import Collection
from pathlib import Path

from leaderboard.compare import compare
from leaderboard.index import load_runs
from leaderboard.published import published_for
from leaderboard.render.csv import render_csv
from leaderboard.render.html import render_html
from leaderboard.render.json import render_json
from leaderboard.render.markdown import render_markdown
from mae_bench.record import RecordError


def write_report(
    runs_dir: str | Path,
    out_dir: str | Path,
    baseline: str = "supervised",
    title: str = "mae_bench leaderboard",
    only: Collection[Path] | None = None,
) -> list[Path]:
    """Writes `leaderboard.md`, `.csv`, `.json` and `.html` into `out_dir` and returns their paths.

    `only` as in load_runs. Published numbers of the same tasks stand apart. RecordError: no run to
    show, or a folder that cannot be written.
    """
    runs = load_runs(runs_dir, only)
    comparison = compare(runs, baseline)
    published = published_for({column.task for column in comparison.columns})
    texts = {
        "leaderboard.md": render_markdown(comparison, published, title),
        "leaderboard.csv": render_csv(comparison),
        "leaderboard.json": render_json(comparison, published, title),
        "leaderboard.html": render_html(comparison, runs, published, title),
    }
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        return [_write(Path(out_dir) / name, text) for name, text in texts.items()]
    except OSError as error:
        raise RecordError(
            f"the report cannot be written to {out_dir}: {error}", expected="a folder to write to"
        ) from error


def _write(path: Path, text: str) -> Path:
    """A reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
