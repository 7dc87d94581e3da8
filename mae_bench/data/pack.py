"""Pack an image set of any form into one file per split, which loads several times faster."""

from pathlib import Path
from typing import Any

from mae_bench.data.sets.open import open_images, set_name, splits_in
from mae_bench.data.sets.packed import How, Progress, pack_sources
from mae_bench.errors import UserError


def pack_set(
    source: str | Path,
    out: Path,
    *,
    short_side: int | None = None,
    quality: int | None = None,
    raw: bool = False,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Packs every split of the set at `source` into the folder `out`; see `How` and `pack_sources`. Returns the header."""
    how = How(short_side, quality, raw)
    splits = splits_in(source)
    sources = {split: open_images(source, split, refresh=True) for split in splits}
    if not sources:
        raise UserError(
            f"{source} holds no images",
            expected="a set of images in any form",
            fix="mae-bench data check images PATH",
        )
    return pack_sources(
        sources, Path(out), how, name=set_name(source), num_workers=num_workers, progress=progress
    )
