"""Pack an image set of any form into one file per split, which loads several times faster."""

from pathlib import Path
from typing import Any

from mae_bench.data.sets.open import find_splits, open_images, read_dataset_name
from mae_bench.data.sets.packed import PackOptions, ProgressCallback, pack_sources
from mae_bench.errors import UserError


def pack_set(
    source: str | Path,
    out: Path,
    *,
    short_side: int | None = None,
    quality: int | None = None,
    raw: bool = False,
    num_workers: int = 0,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Packs every split of the set at `source` into the folder `out`; see `PackOptions` and `pack_sources`. Returns the header."""
    how = PackOptions(short_side, quality, raw)
    splits = find_splits(source)
    sources = {split: open_images(source, split, refresh=True) for split in splits}
    if not sources:
        raise UserError(
            f"{source} holds no images",
            expected="a set of images in any form",
            fix="mae-bench data check images PATH",
        )
    return pack_sources(
        sources, Path(out), how, name=read_dataset_name(source), num_workers=num_workers, progress=progress
    )
