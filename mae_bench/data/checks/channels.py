"""Find what the images of a set are: arrays or files, and of how many channels."""

from collections.abc import Iterator
from pathlib import Path

from mae_bench.data.checks.images import find_image_sets
from mae_bench.data.sets.decode import decode_size, holds_arrays, read_pixels
from mae_bench.data.sets.open import find_splits, open_images
from mae_bench.data.sets.source import BadImage, ImageSource
from mae_bench.errors import UserError

LAYOUTS = ("imagenet", "imagenet_val", "images", "image_sets")  # whose images may have any number of channels
MAX_TRIED = 20  # images per split, of which one must be readable


def check_channels(layout: str, root: str | Path, in_chans: int) -> None:
    """Raise UserError if the first images of a split decode, but not to `in_chans` channels.

    Images that do not decode at all are left to the check of the layout.
    """
    for split, images in _open_splits(layout, root):
        problem = _find_problem(images, in_chans)
        if problem:
            raise UserError(
                f"{split} of {root} has images that a model of {in_chans} channels does not take: {problem}",
                expected=f"images of {in_chans} channels, which the backbone takes (in_chans)",
                fix="give a set of as many channels, or leave the backbone out: backbones.NAME=null",
            )


def trains_on_arrays(layout: str, root: str | Path) -> bool:
    """Return whether the training images of an ImageNet layout are arrays; False if they cannot be read."""
    try:
        return layout == "imagenet" and holds_arrays(open_images(root, "train"))
    except UserError:  # reported by the check of the layout
        return False


def _open_splits(layout: str, root: str | Path) -> Iterator[tuple[str, ImageSource]]:
    if layout == "image_sets":
        name, folder = next(iter(find_image_sets(Path(root)).items()))
        yield name, open_images(folder, "train")
        return
    splits = ["val"] if layout == "imagenet_val" else find_splits(root, plain=layout == "images")
    for split in splits:
        yield split, open_images(root, split)


def _find_problem(images: ImageSource, in_chans: int) -> str:
    """Return why no image that decodes has these channels; "" if one has them, or none decodes."""
    problem = ""
    for i in range(min(MAX_TRIED, len(images))):
        try:
            read_pixels(images, i, in_chans, fast=False)
            return ""
        except (BadImage, OSError) as error:
            reason = str(error)
        if not problem and _decodes(images, i):
            problem = f"{images.name(i)}: {reason}"
    return problem


def _decodes(images: ImageSource, i: int) -> bool:
    try:
        if images.pixels(i) is None:
            decode_size(images.read(i))
    except (BadImage, OSError):
        return False
    return True
