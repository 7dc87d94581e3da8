"""Write the renderings of a report to a folder."""

from collections.abc import Mapping
from pathlib import Path

from mae_bench.files import write_text
from mae_bench.record import RecordError


def write_texts(out_dir: str | Path, texts: Mapping[str, str]) -> list[Path]:
    """Write texts by the names of their files and return the paths; RecordError if the folder refuses."""
    paths = []
    try:
        for name, text in texts.items():
            path = Path(out_dir) / name
            write_text(path, text)
            paths.append(path)
    except OSError as error:
        raise RecordError(
            f"the report cannot be written to {out_dir}: {error}", expected="a folder that can be written"
        ) from error
    return paths
