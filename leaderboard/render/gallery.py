"""The pictures of a report, embedded: what each pretraining reconstructs."""

import base64
from html import escape

from leaderboard.columns import PRETRAIN
from leaderboard.index import Run, Runs

ARTEFACT = "reconstruction"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST = 8 * 2**20  # bytes of a picture: larger ones make a page that no browser likes


def gallery(runs: Runs, problems: list[str]) -> list[str]:
    """A figure for each pretraining that has a reconstruction; one that cannot be shown goes to `problems`."""
    figures = []
    for run in runs.records:
        if run.record.task == PRETRAIN and ARTEFACT in run.record.artefacts:
            try:
                figures.append(_figure(run))
            except (OSError, ValueError) as error:
                problems.append(f"{runs.name(run.path)}: its reconstruction cannot be shown: {error}")
    return figures


def _figure(run: Run) -> str:
    record = run.record
    data = base64.b64encode(_picture(run)).decode()
    name = escape(f"{record.backbone}, {record.protocol}, seed {record.seed}")
    return (
        f"<figure><figcaption><strong>{name}</strong><br>{escape(record.dataset)} {escape(record.split)}</figcaption>"
        '<div class="thirds" aria-hidden="true"><span>original</span><span>masked</span><span>reconstructed</span></div>'
        f'<img src="data:image/png;base64,{data}" alt="Images of {name}: original, masked, reconstructed, one row an image">'
        "</figure>"
    )


def _picture(run: Run) -> bytes:
    """The artefact's bytes; ValueError for a path out of the record's folder and for what is no PNG."""
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
    return data
