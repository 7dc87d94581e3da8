"""The data of an ImageNet protocol: both splits, checked before anything is trained, and the budget of images that may be bad."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from timm.data import ImageNetInfo

from mae_bench.data.images import BadImages, ImageSource, open_images
from mae_bench.data.layouts import LayoutReport, check_layout
from mae_bench.errors import UserError
from tasks.imagenet.config import ImageConfig

IMAGENET_SIZES = {"train": 1_281_167, "val": 50_000}


@dataclass(frozen=True)
class Data:
    """Both splits of an ImageNet layout, checked, with the budget of images that may fail to decode."""

    report: LayoutReport
    train: ImageSource
    val: ImageSource
    bad_train: BadImages
    bad_val: BadImages

    @property
    def num_classes(self) -> int:
        return len(self.report.classes)

    @property
    def notes(self) -> list[str]:
        return [note for note in (*self.report.notes, self.bad_train.note(), self.bad_val.note()) if note]


def open_data(config: ImageConfig) -> Data:
    """Checks the layout before anything is trained; UserError for what is not the data set that the config expects."""
    root = Path(config.data)
    report = check_layout("imagenet", root)
    if config.expect == "imagenet-1k":
        require_imagenet(report)
    train, val = open_images(root, "train"), open_images(root, "val")
    return Data(report, train, val, BadImages(config.max_bad_images, len(train)), BadImages(config.max_bad_images, len(val)))


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1k in the order of their labels, as timm lists them."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def require_imagenet(report: LayoutReport, splits: tuple[str, ...] = ("train", "val")) -> None:
    """UserError unless classes, their order and the splits' sizes are those of ImageNet-1k; it names the difference."""
    known, found = imagenet_classes(), report.classes
    fix = "give the folder of ImageNet-1k, or set expect=null for another data set"
    if found != known:
        absent, strange = sorted(set(known) - set(found)), sorted(set(found) - set(known))
        raise UserError(
            f"{report.root} has {len(found)} classes: {len(absent)} of ImageNet-1k are absent "
            f"({', '.join(absent[:3]) or 'none'}), {len(strange)} are not of it ({', '.join(strange[:3]) or 'none'})",
            expected="the 1000 classes of ImageNet-1k by their WordNet ids", fix=fix,
        )  # fmt: skip
    if report.splits != (sizes := {split: IMAGENET_SIZES[split] for split in splits}):
        raise UserError(f"{report.root} has {report.splits} images", expected=f"{sizes}", fix=fix)
