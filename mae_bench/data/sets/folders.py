"""Images in folders: one folder a class, or one's own images at any depth without classes."""

import os
from pathlib import Path

from mae_bench.data.sets.index import Index, Stamps, build_index, by_folder, stamp
from mae_bench.data.sets.source import is_image


def index_folder(folder: Path) -> Index:
    """Every image below `folder`, hidden files and folders apart, in the order of (folder, name).

    Images that all lie in `CLASS/NAME` have their folder's class; else all have the one class "". OSError names what
    cannot be read.
    """
    names: list[str] = []
    sizes: list[int] = []
    stamps: Stamps = {}
    for inside, found in sorted(walk(str(folder), stamps).items()):
        prefix = "".join(f"{part}/" for part in inside)
        names += [prefix + name for name in sorted(found)]
        sizes += [found[name] for name in sorted(found)]
    targets, classes = by_folder(names)
    return build_index(names, sizes, targets, classes, stamps=stamps)


def walk(top: str, stamps: Stamps) -> dict[tuple[str, ...], dict[str, int]]:
    """Folder (as its parts, relative to `top`) -> its images and their sizes; every folder's stamp is taken before it is read."""
    found: dict[tuple[str, ...], dict[str, int]] = {}
    seen: set[tuple[int, int]] = set()
    todo: list[tuple[str, ...]] = [()]
    while todo:
        inside = todo.pop()
        path = os.path.join(top, *inside)
        here = os.stat(path)
        if (
            here.st_dev,
            here.st_ino,
        ) in seen:  # a link to a folder that was read already, perhaps to one above
            continue
        seen.add((here.st_dev, here.st_ino))
        stamps[path] = stamp(path)
        images: dict[str, int] = {}
        with os.scandir(path) as entries:
            for entry in entries:
                if is_image(entry.name):
                    images[entry.name] = entry.stat().st_size
                elif not entry.name.startswith(".") and entry.is_dir():
                    todo.append((*inside, entry.name))
        found[inside] = images
    return found
