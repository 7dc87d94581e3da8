"""Open an image set of any form: find out what lies at a path and return one split of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mae_bench.data.sets.arrow import ParquetImages, arrow_files, index_arrow, open_unpacked, parquet_files
from mae_bench.data.sets.fetch import fetch_all
from mae_bench.data.sets.folders import index_folder
from mae_bench.data.sets.index import IndexedImages, digest_of, find_index, known_index
from mae_bench.data.sets.listed import Published, find_published, index_listed
from mae_bench.data.sets.packed import is_packed, open_packed, read_header
from mae_bench.data.sets.shards import EXPECTED as PATTERNS
from mae_bench.data.sets.shards import (
    expand_pattern,
    has_pattern,
    is_pattern,
    is_url,
    pattern_name,
    shards_in,
)
from mae_bench.data.sets.source import ImageSource
from mae_bench.data.sets.tars import has_classes, index_shards, index_tar
from mae_bench.errors import UserError
from mae_bench.files import json_digest

NUM_SAMPLED = 64  # images a split whose content counts in the digest of the set
KNOWN = (
    f"folders of images, train.tar, shards ({PATTERNS}), a packed set, Arrow or Parquet files, "
    "or iNaturalist or Places as published"
)


def open_images(root: str | Path, split: str, *, refresh: bool = False) -> ImageSource:
    """Return the images of one split ("train", "val") of whatever kind of set lies at `root`.

    refresh: look at every file again, even if the cache knows the set.
    Raises UserError for a set that is missing or cannot be read.
    """
    try:
        source = _open(str(root), split, refresh)
    except OSError as error:  # a link to nowhere, a folder that may not be read
        raise UserError(f"{root} cannot be read: {error}", expected="files that can be opened") from error
    if source is None:
        raise UserError(
            f"no images for {split} in {root}", expected=KNOWN, fix=f"mae-bench data check imagenet {root}"
        )
    if not len(source):
        place = Path(root) / split if (Path(root) / split).is_dir() else root
        raise UserError(f"no images in {place}", expected="CLASS/NAME.JPEG, or images at any depth")
    return source


def splits_in(root: str | Path, plain: bool = True) -> list[str]:
    """Which of train and val are there, by the names of files and folders alone; plain: a folder without splits is train."""
    return [split for split in ("train", "val") if _has(str(root), split, plain)]


def set_name(root: str | Path) -> str:
    """What a set is called: as its dataset.json, its packed header or the lists of its publisher say, else as its folder."""
    if is_pattern(str(root)):
        return pattern_name(str(root))
    root = Path(root)
    if is_packed(root):
        return str(read_header(root).get("name") or root.resolve().name)
    try:
        return str(json.loads((root / "dataset.json").read_text(encoding="utf-8"))["name"])
    except FileNotFoundError:
        published = find_published(root)
        return published.name if published else root.resolve().name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root / 'dataset.json'} gives no name: {error!r}", expected='{"name": ...}'
        ) from error


def set_digest(sources: Mapping[str, ImageSource]) -> str:
    """SHA-256 of a set: over all names and sizes and the content of some images, or of what its splits say of their content.

    Some images are read because arrays, and other files without compression, are of one size whatever is in them.
    """
    indexed = {
        split: s.index
        for split, s in sources.items()
        if isinstance(s, IndexedImages) and not s.content_digest
    }
    if len(indexed) == len(sources):
        return json_digest([digest_of(indexed), *(_sample(sources[split]) for split in sorted(sources))])
    return json_digest({split: source.digest for split, source in sources.items()})


def _sample(source: ImageSource) -> list[str]:
    """SHA-256 of images that are spread over the split; "" of one that cannot be read."""
    count = min(NUM_SAMPLED, len(source))
    return [_content(source, i * len(source) // count) for i in range(count)]


def _content(source: ImageSource, i: int) -> str:
    try:
        return hashlib.sha256(source.read(i)).hexdigest()
    except OSError:
        return ""


def _has(root: str, split: str, plain: bool) -> bool:
    if is_pattern(root):
        return has_pattern(root, split)
    place = Path(root)
    if is_packed(place):
        return split in read_header(place)["splits"]
    if published := find_published(place):
        return published.list_of(place, split) is not None
    if (
        (place / split).is_dir()
        or (place / f"{split}.tar").is_file()
        or (plain and split == "train" and is_plain(place))
    ):
        return True
    return any(find(place, split) for find in (arrow_files, parquet_files, shards_in))


def is_plain(root: Path) -> bool:
    """Whether the folder has no splits and so holds the training images itself."""
    return root.is_dir() and not any(
        (root / name).exists() for name in ("train", "val", "train.tar", "val.tar")
    )


def _open(root: str, split: str, refresh: bool) -> ImageSource | None:
    if is_pattern(root):
        return _shards(expand_pattern(root, split), refresh)
    place = Path(root)
    if is_packed(place):
        return open_packed(place, split)
    if published := find_published(place):
        return _listed(place, published, split, refresh)
    folder = _place_of(
        place, split
    )  # a known one first: to look for tables and shards lists every file again
    if folder and not refresh and (index := known_index(_key("folder", [folder]))):
        return IndexedImages(index, folder)
    if files := arrow_files(place, split):
        return _arrow(files, refresh)
    if files := parquet_files(place, split):
        return open_unpacked(ParquetImages(files), str(files[0].absolute()))
    return _tars(place, split, refresh) or _folder(place, split, refresh)


def _key(kind: str, paths: Sequence[str | Path]) -> str:
    return f"{kind}:{json_digest([str(Path(path).absolute()) for path in paths])}"


def _place_of(root: Path, split: str) -> Path | None:
    """The folder that holds a split's images, if they lie in folders."""
    return root / split if (root / split).is_dir() else root if split == "train" and is_plain(root) else None


def _folder(root: Path, split: str, refresh: bool) -> ImageSource | None:
    folder = _place_of(root, split)
    if folder is None:
        return None
    return IndexedImages(find_index(_key("folder", [folder]), lambda: index_folder(folder), refresh), folder)


def _tars(root: Path, split: str, refresh: bool) -> ImageSource | None:
    tar, shards = root / f"{split}.tar", shards_in(root, split)
    if shards == [tar] and has_classes(tar):
        return IndexedImages(find_index(_key("tar", [tar]), lambda: index_tar(tar), refresh), root)
    return _shards([str(path) for path in shards], refresh) if shards else None


def _listed(root: Path, published: Published, split: str, refresh: bool) -> ImageSource | None:
    if not published.list_of(root, split):
        return None
    index = find_index(_key("listed", [root, split]), lambda: index_listed(root, published, split), refresh)
    labels = hashlib.sha256(index.targets.tobytes()).hexdigest()  # which the names of the images do not tell
    return IndexedImages(index, root, digest=json_digest([digest_of({"": index}), labels, index.classes]))


def _shards(places: Sequence[str], refresh: bool) -> ImageSource:
    paths = fetch_all(places) if is_url(places[0]) else [Path(place).absolute() for place in places]
    return IndexedImages(find_index(_key("shards", paths), lambda: index_shards(paths), refresh), "/")


def _arrow(files: Sequence[Path], refresh: bool) -> ImageSource:
    files = [path.absolute() for path in files]
    return IndexedImages(find_index(_key("arrow", files), lambda: index_arrow(files), refresh), "/")
