"""The content of a data set's folder: files, sizes and digests, and how errors describe it."""

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mae_bench.data.sets.folders import file_size
from mae_bench.data.sets.source import is_image
from mae_bench.errors import UserError

Layout = Literal["imagenet", "coco", "ade20k", "images", "imagenet_val", "image_sets"]
EXPECTED: dict[str, str] = {
    "imagenet": "train/CLASS/NAME.JPEG and val/CLASS/NAME.JPEG; or train.tar and val.tar with members "
    "CLASS/NAME.JPEG; or a packed set, Arrow or Parquet files or shards, with labels; "
    "or iNaturalist 2017 to 2019 or Places as published",
    "imagenet_val": "val/CLASS/NAME.JPEG, or val.tar, or any other form of imagenet; train is optional",
    "image_sets": "CLASS/NAME.JPEG, or CORRUPTION/SEVERITY/CLASS/NAME.JPEG as in ImageNet-C",
    "images": "images at any depth, in train/ (and val/) or in the folder itself; or any form of imagenet",
    "coco": "train2017/*.jpg, val2017/*.jpg and annotations/instances_{train,val}2017.json",
    "ade20k": "images/{training,validation}/*.jpg, annotations/{training,validation}/*.png "
    "and objectInfo*.txt",
}


@dataclass(frozen=True)
class Content:
    """Fields of a LayoutReport that a check of a layout finds."""

    splits: dict[str, int]
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()
    split_digests: dict[str, str] = field(default_factory=dict)
    labels: dict[str, tuple[int, ...]] = field(default_factory=dict)


def digest_files(files: dict[str, int | str]) -> str:
    """Return SHA-256 over relative paths with their size in bytes, or the SHA-256 of their content."""
    lines = [f"{path}\0{mark}\n" for path, mark in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def join_names(names: Collection[Any], num_shown: int = 5) -> str:
    """Return the first names, sorted, and their number if there are more."""
    shown = ", ".join(map(str, sorted(names)[:num_shown]))
    return shown + (f", ... ({len(names)} in total)" if len(names) > num_shown else "")


def describe_folder(folder: Path) -> str:
    """Return what is at `folder`, for an error: its first entries, or that there are none."""
    if folder.is_file():
        return "a file"
    if not folder.is_dir():
        return "no such folder"
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(folder)]
    return join_names(names) or "an empty folder"


def list_images(folder: Path) -> dict[str, int]:
    """Return names and sizes of the images directly in `folder`."""
    return {entry.name: file_size(entry) for entry in os.scandir(folder) if is_image(entry.name)}


def require_images(folder: Path, expected: str) -> dict[str, int]:
    """Return the images of a folder; raise UserError if there are none."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing; found: {describe_folder(folder.parent)}",
            expected=expected,
            fix="unpack it, or rename the folder that holds them",
        )
    found = list_images(folder)
    if not found:
        raise UserError(
            f"no images in {folder}; found: {describe_folder(folder)}",
            expected=expected,
            fix=f"move the images into {folder} itself",
        )
    return found
