"""Pictures of a report: what each pretraining reconstructs."""

import hashlib

from leaderboard.columns import PRETRAIN
from leaderboard.index import Run, Runs
from leaderboard.sections import Figure, Figures, Picture, Results, Section

TITLE = "Reconstructions"
ARTEFACT = "reconstruction"
HEADINGS = ("original", "masked", "reconstructed")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST = 8 * 2**20  # bytes of one picture, which is embedded in the page


def build_section(results: Results) -> Section | None:
    """Return a figure for each pretraining whose reconstruction can be shown."""
    figures = []
    for run in _find_runs(results.runs):
        try:
            figures.append(_build_figure(run))
        except (OSError, ValueError):
            continue  # named by find_problems
    return Section(TITLE, (Figures(tuple(figures)),), medium="page") if figures else None


def find_problems(runs: Runs) -> list[str]:
    """Return a sentence for each reconstruction that cannot be shown."""
    problems = []
    for run in _find_runs(runs):
        try:
            _read_picture(run)
        except (OSError, ValueError) as error:
            problems.append(f"{runs.name(run.path)}: the reconstruction cannot be shown: {error}")
    return problems


def _find_runs(runs: Runs) -> list[Run]:
    return [run for run in runs.records if run.record.task == PRETRAIN and ARTEFACT in run.record.artefacts]


def _build_figure(run: Run) -> Figure:
    record = run.record
    name = f"{record.backbone}, {record.protocol}, seed {record.seed}"
    return Figure(
        name,
        f"{record.dataset} {record.split}",
        f"Images of {name}: {', '.join(HEADINGS)}, one row per image",
        Picture(_read_picture(run), HEADINGS),
    )


def _read_picture(run: Run) -> bytes:
    """Return the artefact's bytes.

    Raise ValueError for a path outside the record's folder, and for a file that is missing, too large,
    not a PNG, or not the one that the record describes.
    """
    folder = run.path.parent.resolve()
    path = (folder / str(run.record.artefacts[ARTEFACT])).resolve()
    if not path.is_relative_to(folder):
        raise ValueError("its path leads out of the record's folder")
    if not path.is_file():
        raise ValueError("its file is missing")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST // 2**20} MiB")
    data = path.read_bytes()
    if not data.startswith(SIGNATURE):
        raise ValueError("it is not a PNG")
    digest = run.record.artefact_digests.get(ARTEFACT)
    if digest and digest != {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}:
        raise ValueError("its file was changed or damaged after the record was written")
    return data
