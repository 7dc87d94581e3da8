"""Pack an image set of any form into one file per split, which loads several times faster."""

from pathlib import Path
from typing import Any

from mae_bench.data.sets.open import find_splits, open_images, read_dataset_name
from mae_bench.data.sets.packing import PackOptions, ProgressCallback, pack_sources
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
    """Pack every split of the set at `source` into the folder `out` and return the header.

    See `PackOptions` for short_side, quality and raw.
    """
    options = PackOptions(short_side, quality, raw)
    sources = {split: open_images(source, split, refresh=True) for split in find_splits(source)}
    if not sources:
        raise UserError(
            f"no images in {source}",
            expected="a set of images in any form",
            fix="mae-bench data check images PATH",
        )
    name = read_dataset_name(source)
    return pack_sources(sources, Path(out), options, name=name, num_workers=num_workers, progress=progress)
