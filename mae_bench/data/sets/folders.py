"""Index images in folders: one folder per class, or images at any depth without classes."""

import os
import stat
from pathlib import Path

from mae_bench.data.sets.index import Index, Stamps, build_index, classify_by_folder, stamp
from mae_bench.data.sets.source import is_image
from mae_bench.errors import UserError

KINDS = {  # of what is neither a file nor a folder
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def index_folder(folder: Path) -> Index:
    """Index every image below `folder` in the order of (folder, name); hidden files and folders are ignored.

    If all images are at `CLASS/NAME`, their class is their folder; otherwise all have the single class "".
    Raises OSError for a file or folder that cannot be read.
    """
    names: list[str] = []
    sizes: list[int] = []
    stamps: Stamps = {}
    for parts, images in sorted(list_images(str(folder), stamps).items()):
        prefix = "".join(f"{part}/" for part in parts)
        names += [prefix + name for name in sorted(images)]
        sizes += [images[name] for name in sorted(images)]
    targets, classes = classify_by_folder(names)
    return build_index(names, sizes, targets, classes, stamps=stamps)


def list_images(top: str, stamps: Stamps) -> dict[tuple[str, ...], dict[str, int]]:
    """Return the images and their sizes in each folder below `top`, by the parts of its relative path.

    The stamp of each folder is added to `stamps` before the folder is read.
    """
    found: dict[tuple[str, ...], dict[str, int]] = {}
    seen: set[tuple[int, int]] = set()
    todo: list[tuple[str, ...]] = [()]
    while todo:
        parts = todo.pop()
        path = os.path.join(top, *parts)
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:  # a link to a folder that was already read, possibly a parent
            continue
        seen.add(identity)
        stamps[path] = stamp(path)
        images: dict[str, int] = {}
        with os.scandir(path) as entries:
            for entry in entries:
                if is_image(entry.name):
                    images[entry.name] = file_size(entry)
                elif not entry.name.startswith(".") and entry.is_dir():
                    todo.append((*parts, entry.name))
        found[parts] = images
    return found


def file_size(path: os.DirEntry[str] | Path) -> int:
    """Return the size of a file in bytes; raise UserError for what is no file.

    To open a named pipe would wait for ever, and a device has no end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise UserError(
            f"{os.fspath(path)} is {kind}", expected="a file", fix="remove it, or give it another name"
        )
    return status.st_size
