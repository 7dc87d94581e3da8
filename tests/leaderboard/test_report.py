"""Test every rendering of one folder of runs: the same numbers, and all text of records escaped."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from leaderboard.compare import compare
from leaderboard.index import load_runs
from leaderboard.remarks import build_failures
from leaderboard.render.terminal import print_report
from leaderboard.report import build_report, load_results, write_report
from leaderboard.sections import Bullets
from mae_bench.record import NO_BACKBONE, RecordError

if TYPE_CHECKING:
    from tests.leaderboard.conftest import Folder

EVIL = "<script>alert(1)</script>"
ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


class Page(HTMLParser):
    """The addresses, tags and table rows of a page, as a browser reads them."""

    def __init__(self, html: str):
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.loads += [
            str(value) for name, value in attrs if name in ("src", "srcset", "data", "poster", "action")
        ]
        self.loads += [str(values["href"])] if tag != "a" and "href" in values else []
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture
def runs(folder: Folder, seeds: Callable) -> Path:
    seeds("supervised", 63.0, 63.4, 62.6)
    seeds("mae", 61.2, 61.0, 61.4)
    seeds("mae", 8.9, task="coco", protocol="maskrcnn-li2021-100ep", main_metric="AP_box")
    folder.fail("random", f"cannot import {EVIL}")
    path = folder.add(
        "mae", 0.4, task="pretrain", main_metric="loss", artefacts={"reconstruction": "reconstruction.png"}
    )
    Image.new("RGB", (30, 10)).save(path.parent / "reconstruction.png")
    folder.add(
        EVIL, 10.0, command=EVIL, notes=[EVIL], versions={EVIL: EVIL}, hardware={"cpu": EVIL}, git_hash=EVIL
    )
    return folder.root


@pytest.fixture
def texts(runs: Path, tmp_path: Path) -> dict[str, str]:
    paths = write_report(runs, tmp_path / "out", title=f"A {EVIL}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in paths)
    return {path.suffix: path.read_text(encoding="utf-8") for path in paths}


def terminal(runs: Path, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_report(build_report(load_results(runs)), console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_terminal_shows_scores_reasons_and_verdicts(runs: Path) -> None:
    text = terminal(runs)
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "61.2 ± 0.2 (n=3)",
        "63.0 ± 0.4 (n=3)",
        "-1.8",
        "failed",
        "cannot import",
        "make setup",
        EVIL,
    ):
        assert part in " ".join(text.split())


def test_the_terminal_splits_wide_comparisons(folder: Folder) -> None:
    for i in range(9):
        folder.add("supervised", 50 + i, protocol=f"maskrcnn-li2021-{i}00ep")
    text = terminal(folder.root)
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"maskrcnn-li2021-{i}00ep" in text and f"{50 + i}.0 (n=1)" in text for i in range(9))


def test_markdown_keeps_tables_whole_and_text_as_text(texts: dict[str, str]) -> None:
    lines = texts[".md"].splitlines()
    table = [line for line in lines[: lines.index("## Summary")] if line.startswith("|")]
    assert {line.count("|") - line.count("\\|") for line in table} == {4}
    assert "| mae | 61.2 ± 0.2 (n=3)<br>-1.8 \\[-3.3, -0.3\\] |" in texts[".md"]
    assert "<script" not in texts[".md"].replace("\\<script", "")
    assert "not comparable with the runs above" in texts[".md"]


def test_csv_reads_back_with_full_precision_and_no_number_for_what_is_missing(texts: dict[str, str]) -> None:
    frame = pd.read_csv(io.StringIO(texts[".csv"]))
    assert len(frame) == 4 * 2
    mae = frame[(frame.backbone == "mae") & (frame.task == "imagenet")].iloc[0]
    assert (mae.n, mae["mean"], mae.difference, mae.seconds) == pytest.approx((3, 61.2, -1.8, 22))
    failed = frame[(frame.backbone == "random") & (frame.task == "imagenet")].iloc[0]
    assert failed.status == "failed"
    assert failed[["mean", "std", "difference", "low", "high"]].isna().all()
    assert EVIL in failed.reason
    missing = [row for row in csv.DictReader(io.StringIO(texts[".csv"])) if row["status"] != "measured"]
    assert missing
    assert all(row["mean"] == row["difference"] == "" for row in missing)


def test_json_holds_the_comparison_exactly(texts: dict[str, str], runs: Path) -> None:
    value, comparison = json.loads(texts[".json"]), compare(load_runs(runs))
    assert {name: value[name] for name in comparison.to_dict()} == comparison.to_dict()
    assert value["cells"]["mae"][0]["values"] == [61.2, 61.0, 61.4]
    assert value["cells"]["random"][0]["mean"] is None
    assert all(row["source"] for row in value["published"]["rows"])


def test_html_loads_nothing_and_runs_nothing_of_a_record(texts: dict[str, str]) -> None:
    page = Page(texts[".html"])
    assert all(address.startswith("data:image/png;base64,") for address in page.loads)
    assert len(page.loads) == 1
    assert page.tags.count("script") == 1
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "url(" not in texts[".html"]
    assert "@import" not in texts[".html"]
    assert EVIL not in texts[".html"]


def test_html_has_the_table_the_reasons_and_the_sources(texts: dict[str, str]) -> None:
    page = Page(texts[".html"])
    rows = {row[0].removesuffix("baseline"): row[1:] for row in page.rows[1:5]}
    assert list(rows) == ["supervised", EVIL, "mae", "random"]
    assert rows["mae"][0] == "61.2 ± 0.2 (n=3)−1.8 [−3.3, −0.3] worse"
    assert rows["supervised"][0] == "63.0 ± 0.4 (n=3) best"
    assert rows["random"] == ["failed", "-"]
    assert 'title="cannot import &lt;script&gt;' in texts[".html"]
    for part in (
        "<caption>",
        'scope="col"',
        'scope="row"',
        "<svg",
        "prefers-color-scheme: dark",
        "mae-bench demo",
        "d" * 64,
    ):
        assert part in texts[".html"]
    assert "https://arxiv.org/abs/2111.06377" in texts[".html"]


@pytest.mark.parametrize(
    ("artefact", "content", "named"),
    [
        ("../../../secret.png", b"\x89PNG\r\n\x1a\n", "leads out of"),
        ("missing.png", None, "missing"),
        ("picture.png", b"<svg onload=alert(1)>", "not a PNG"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_named(
    folder: Folder, tmp_path: Path, artefact: str, content: bytes | None, named: str
) -> None:
    path = folder.add("mae", 0.4, task="pretrain", main_metric="loss", artefacts={"reconstruction": artefact})
    if content is not None:
        (path.parent / artefact).write_bytes(content)
    html = write_report(folder.root, tmp_path / "out")[-1].read_text()
    assert "<img" not in html
    assert "the reconstruction cannot be shown" in html
    assert named in html


def test_a_picture_that_is_not_the_one_of_its_record_is_named(folder: Folder, tmp_path: Path) -> None:
    picture = b"\x89PNG\r\n\x1a\n" + bytes(100)
    digest = {"sha256": hashlib.sha256(picture).hexdigest(), "bytes": len(picture)}
    path = folder.add(
        "mae",
        0.4,
        task="pretrain",
        main_metric="loss",
        artefacts={"reconstruction": "reconstruction.png"},
        artefact_digests={"reconstruction": digest},
    ).with_name("reconstruction.png")
    path.write_bytes(picture)
    assert "<img" in write_report(folder.root, tmp_path / "out")[-1].read_text()
    path.write_bytes(picture[:-1] + b"\1")
    html = write_report(folder.root, tmp_path / "out")[-1].read_text()
    assert "<img" not in html
    assert "changed or damaged after the record was written" in html


def test_charts_start_at_zero(folder: Folder, seeds: Callable, tmp_path: Path) -> None:
    seeds("supervised", 50.0)
    seeds("mae", 25.0)
    html = write_report(folder.root, tmp_path / "out")[-1].read_text()
    # the axis ends at 50, so the baseline's bar is the whole width (320) and the other one half of it
    assert '<rect class="plain" x="0.0" y="22" width="320.0"' in html
    assert '<rect class="bar" x="0.0" y="60" width="160.0"' in html


def test_bars_of_negative_scores_end_at_zero(folder: Folder, seeds: Callable, tmp_path: Path) -> None:
    seeds("supervised", -2.0, unit="dB")
    seeds("mae", -1.0, unit="dB")
    html = write_report(folder.root, tmp_path / "out")[-1].read_text()
    assert '<rect class="plain" x="0.0" y="22" width="320.0"' in html
    assert '<rect class="bar" x="160.0" y="60" width="160.0"' in html


def test_every_file_names_the_version_of_the_protocol_and_the_code(
    folder: Folder, seeds: Callable, tmp_path: Path
) -> None:
    seeds("mae", 61.0, 62.0, protocol_version=7, code_digest="c0de" * 16, git_hash="f00d" * 10)
    paths = write_report(folder.root, tmp_path / "out")
    texts = {path.suffix: path.read_text() for path in paths}
    content = json.loads(texts[".json"])
    assert content["columns"][0]["protocol_version"] == 7
    assert content["cells"]["mae"][0]["code"] == ["c0dec0dec0de"]
    (line,) = csv.DictReader(io.StringIO(texts[".csv"]))
    assert (line["protocol_version"], line["code"]) == ("7", "c0dec0dec0de")
    assert "| imagenet linear-90ep | shapes val | 7 | c0dec0dec0de |" in texts[".md"]
    assert texts[".html"].count("imagenet linear-90ep, version 7") == 2, "once per record"
    assert "c0dec0dec0de" in texts[".html"]
    assert "f00d" * 10 in texts[".html"]


def test_importing_the_report_loads_no_heavy_package() -> None:
    heavy = "{'torch', 'pandas', 'numpy', 'rich'} & set(sys.modules)"
    code = f"import sys, leaderboard.report; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_only_failures_make_a_report(folder: Folder, tmp_path: Path) -> None:
    folder.fail("mae", "disk is full")
    for path in write_report(folder.root, tmp_path / "out"):
        assert "disk is full" in path.read_text()


def test_a_folder_that_cannot_be_written_is_a_user_error(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot be written"):
        write_report(runs, tmp_path / "file")


@pytest.mark.extended
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_browser_shows_the_rows_and_makes_them_sortable(texts: dict[str, str], tmp_path: Path) -> None:
    options = (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
    )
    quiet = ("disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}", "dump-dom")
    address = (tmp_path / "out" / "leaderboard.html").as_uri()
    command = [str(CHROMIUM), *(f"--{option}" for option in (*options, *quiet)), address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    page = Page(done.stdout)
    assert [row[0].removesuffix("baseline") for row in page.rows[1:5]] == [
        "supervised",
        EVIL,
        "mae",
        "random",
    ]
    assert 'aria-sort="none"><button type="button">' in done.stdout


def test_a_backbone_that_failed_is_reported_once(folder: Folder, tmp_path: Path) -> None:
    folder.add("mae", 60.0)
    folder.fail("resnet50", "resnet50.pth is a ResNet", task="pretrain", protocol="checkpoint")
    for protocol in ("linear-90ep", "knn"):
        folder.fail("resnet50", f"{NO_BACKBONE} ('resnet50'): see the reason given for it", protocol=protocol)
    section = build_failures(load_results(folder.root, "mae"))
    assert section is not None
    (bullets,) = section.blocks
    assert isinstance(bullets, Bullets)
    (line,) = bullets.items
    assert (
        line == "resnet50, pretrain checkpoint, seed 0: failed: resnet50.pth is a ResNet (next: make setup)"
    )
