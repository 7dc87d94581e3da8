"""Open an image set of any form: detect its form and return one of its splits."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mae_bench.data.sets.arrow import (
    ParquetImages,
    find_arrow_files,
    find_parquet_files,
    index_arrow,
    open_unpacked,
)
from mae_bench.data.sets.fetch import fetch_all
from mae_bench.data.sets.folders import file_size, index_folder
from mae_bench.data.sets.index import (
    IndexedImages,
    digest_indexes,
    load_cached_index,
    load_or_build_index,
    stamp,
)
from mae_bench.data.sets.listed import Published, find_published, index_listed
from mae_bench.data.sets.packed import is_packed, open_packed, read_header
from mae_bench.data.sets.shards import EXPECTED as PATTERNS
from mae_bench.data.sets.shards import (
    expand_pattern,
    find_shards,
    has_pattern,
    is_pattern,
    is_url,
    name_pattern,
)
from mae_bench.data.sets.source import ImageSource
from mae_bench.data.sets.tars import has_classes, index_shards, index_tar, read_members
from mae_bench.errors import UserError
from mae_bench.files import json_digest

NUM_SAMPLED = 64  # images per split whose content is part of the digest of the set
KNOWN = (
    f"folders of images, train.tar, shards ({PATTERNS}), a packed set, Arrow or Parquet files, "
    "or iNaturalist or Places as published"
)


def open_images(root: str | Path, split: str, *, refresh: bool = False) -> ImageSource:
    """Return the images of one split ("train" or "val") of the set at `root`, whatever its form.

    refresh: index every file again, even if the set is cached.
    Raises UserError if the set is missing or cannot be read.
    """
    try:
        source = _open(str(root), split, refresh)
    except OSError as error:  # a broken link, a folder without read permission
        raise UserError(f"{root} cannot be read: {error}", expected="files that can be opened") from error
    if source is None:
        raise UserError(
            f"no images for {split} in {root}", expected=KNOWN, fix=f"mae-bench data check imagenet {root}"
        )
    if not len(source):
        place = Path(root) / split if (Path(root) / split).is_dir() else root
        raise UserError(f"no images in {place}", expected="CLASS/NAME.JPEG, or images at any depth")
    return source


def find_splits(root: str | Path, plain: bool = True) -> list[str]:
    """Return which of train and val exist, judged by the names of files and folders only.

    plain: a folder without splits counts as train.
    """
    return [split for split in ("train", "val") if _has_split(str(root), split, plain)]


def read_dataset_name(root: str | Path) -> str:
    """Return the name of a set: of its dataset.json, packed header or published lists, else of its folder."""
    if is_pattern(str(root)):
        return name_pattern(str(root))
    root = Path(root)
    if is_packed(root):
        return str(read_header(root).get("name") or root.resolve().name)
    try:
        file_size(root / "dataset.json")
        return str(json.loads((root / "dataset.json").read_text(encoding="utf-8"))["name"])
    except FileNotFoundError:
        published = find_published(root)
        return published.name if published else root.resolve().name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root / 'dataset.json'} has no name: {error!r}", expected='{"name": ...}'
        ) from error


def digest_dataset(sources: Mapping[str, ImageSource]) -> str:
    """Return the SHA-256 of a set: over names, sizes and some content, or over the digests of its splits.

    Some images are read because arrays and other uncompressed files have the same size whatever their
    content.
    """
    indexes = {
        split: source.index
        for split, source in sources.items()
        if isinstance(source, IndexedImages) and not source.content_digest
    }
    if len(indexes) == len(sources):
        samples = [_digest_sample(sources[split]) for split in sorted(sources)]
        return json_digest([digest_indexes(indexes), *samples])
    return json_digest({split: source.digest for split, source in sources.items()})


def _digest_sample(source: ImageSource) -> list[str]:
    """Return the SHA-256 of images spread over the split; "" for an image that cannot be read."""
    num_images = min(NUM_SAMPLED, len(source))
    return [_digest_image(source, i * len(source) // num_images) for i in range(num_images)]


def _digest_image(source: ImageSource, i: int) -> str:
    try:
        return hashlib.sha256(source.read(i)).hexdigest()
    except OSError:
        return ""


def _has_split(root: str, split: str, plain: bool) -> bool:
    if is_pattern(root):
        return has_pattern(root, split)
    folder = Path(root)
    if is_packed(folder):
        return split in read_header(folder)["splits"]
    published = find_published(folder)
    if published:
        return published.find_list(folder, split) is not None
    if (folder / split).is_dir() or (folder / f"{split}.tar").is_file():
        return True
    if plain and split == "train" and is_plain(folder):
        return True
    return any(find(folder, split) for find in (find_arrow_files, find_parquet_files, find_shards))


def is_plain(root: Path) -> bool:
    """Return whether the folder has no splits and so holds the training images itself."""
    if not root.is_dir():
        return False
    return not any((root / name).exists() for name in ("train", "val", "train.tar", "val.tar"))


def _open(root: str, split: str, refresh: bool) -> ImageSource | None:
    if is_pattern(root):
        return _open_shards(expand_pattern(root, split), refresh)
    place = Path(root)
    if is_packed(place):
        return open_packed(place, split)
    published = find_published(place)
    if published:
        return _open_listed(place, published, split, refresh)
    # A cached folder comes first: looking for tables and shards would list every file again.
    folder = _find_folder(place, split)
    cached = load_cached_index(_build_key("folder", [folder])) if folder and not refresh else None
    if folder and cached is not None:
        return IndexedImages(cached, folder)
    arrow_files = find_arrow_files(place, split)
    if arrow_files:
        return _open_arrow(arrow_files, refresh)
    parquet_files = find_parquet_files(place, split)
    if parquet_files:
        stamps = [[str(path.absolute()), *stamp(path)[:2]] for path in parquet_files]  # size, modified
        return open_unpacked(ParquetImages(parquet_files), json_digest(stamps))
    return _open_tars(place, split, refresh) or _open_folder(place, split, refresh)


def _build_key(kind: str, paths: Sequence[str | Path]) -> str:
    return f"{kind}:{json_digest([str(Path(path).absolute()) for path in paths])}"


def _find_folder(root: Path, split: str) -> Path | None:
    """Return the folder that holds a split's images; None if there is none."""
    if (root / split).is_dir():
        return root / split
    return root if split == "train" and is_plain(root) else None


def _open_folder(root: Path, split: str, refresh: bool) -> ImageSource | None:
    folder = _find_folder(root, split)
    if folder is None:
        return None
    index = load_or_build_index(_build_key("folder", [folder]), lambda: index_folder(folder), refresh)
    return IndexedImages(index, folder)


def _open_tars(root: Path, split: str, refresh: bool) -> ImageSource | None:
    tar, shards = root / f"{split}.tar", find_shards(root, split)
    if shards == [tar] and has_classes(tar):
        return IndexedImages(
            load_or_build_index(_build_key("tar", [tar]), lambda: index_tar(tar), refresh), root
        )
    return _open_shards([str(path) for path in shards], refresh) if shards else None


def _open_listed(root: Path, published: Published, split: str, refresh: bool) -> ImageSource | None:
    if not published.find_list(root, split):
        return None
    key = _build_key("listed", [root, split])
    index = load_or_build_index(key, lambda: index_listed(root, published, split), refresh)
    labels = hashlib.sha256(index.targets.tobytes()).hexdigest()  # the names of the images do not show them
    digest = json_digest([digest_indexes({"": index}), labels, index.classes])
    return IndexedImages(index, root, digest=digest)


def _open_shards(places: Sequence[str], refresh: bool) -> ImageSource:
    paths = (
        fetch_all(places, read_members) if is_url(places[0]) else [Path(place).absolute() for place in places]
    )
    return IndexedImages(
        load_or_build_index(_build_key("shards", paths), lambda: index_shards(paths), refresh), "/"
    )


def _open_arrow(files: Sequence[Path], refresh: bool) -> ImageSource:
    paths = [path.absolute() for path in files]
    return IndexedImages(
        load_or_build_index(_build_key("arrow", paths), lambda: index_arrow(paths), refresh), "/"
    )
