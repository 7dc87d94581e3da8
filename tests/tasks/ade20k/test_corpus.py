"""Variants of an ADE20K folder: each trains and scores exactly, or is refused before the first step.

A perfect segmentor, which predicts the labels as read here by Pillow and numpy alone, reaches 100 % on every
accepted variant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_bench.data.checks.layouts import LayoutReport, check_layout
from mae_bench.errors import UserError
from mae_bench.job import Job
from mae_bench.progress import Progress
from mae_bench.spec import BackboneSpec
from tasks.ade20k.config import UPerNetConfig

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample

from backbones.translating.report import ConversionReport
from tasks.ade20k.data import ADE20KLayout
from tasks.ade20k.metrics import ExactIoUMetric
from tasks.ade20k.mmseg_config import build_mmseg_config
from tasks.context import TaskContext

pytestmark = pytest.mark.framework

NAMES = ("sky", "grass", "ball")
HEIGHT, WIDTH = 40, 44


@dataclass(frozen=True)
class Variant:
    """A change of the folder; `words` of the error that refuses it, or None if it is accepted."""

    name: str
    change: Callable[[Path], object]
    words: tuple[str, ...] | None = None
    notes: int = 0

    def __str__(self) -> str:
        return self.name


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def maps(root: Path, split: str = "*") -> list[Path]:
    return sorted(root.glob(f"annotations/{split}/*.png"))


def rewrite(
    edit: Callable[[np.ndarray], np.ndarray], split: str = "*", first: int | None = None
) -> Callable[[Path], None]:
    """Return a change of the label maps of a split: all, or the first few."""

    def change(root: Path) -> None:
        for path in maps(root, split)[:first]:
            Image.fromarray(edit(read(path).copy())).save(path)

    return change


def convert(mode: str) -> Callable[[Path], None]:
    """Return a change of the first validation map to another mode of Pillow's."""

    def change(root: Path) -> None:
        path = maps(root, "validation")[0]
        Image.open(path).convert(mode).save(path)

    return change


def add_palette(root: Path) -> None:
    for path in maps(root):
        image = Image.fromarray(read(path), "P")
        image.putpalette([255 - i // 3 for i in range(768)])
        image.save(path)


def save_images(**options: Any) -> Callable[[Path], None]:
    """Return a change that saves every image again with Pillow's options."""

    def change(root: Path) -> None:
        for path in root.glob("images/*/*.jpg"):
            Image.open(path).save(path, **options)

    return change


def convert_images(mode: str, name: str = "JPEG") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in root.glob("images/*/*.jpg"):
            Image.open(path).convert(mode).save(path, name)

    return change


def turn(orientation: int) -> Callable[[Path], None]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save_images(exif=exif)


def compress_maps(root: Path) -> None:
    for path in maps(root):
        Image.open(path).save(path, optimize=True)


def rename(pattern: str, suffix: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in sorted(root.glob(pattern)):
            path.rename(path.with_suffix(suffix))

    return change


def write_info(text: str, encoding: str = "utf-8") -> Callable[[Path], object]:
    return lambda root: (root / "objectInfo.txt").write_text(text, encoding=encoding)


def table(*names: str, header: str = "Idx\tName", row: str = "{}\t{}") -> str:
    lines = [row.format(i, name) for i, name in enumerate(names, 1)]
    return "\n".join([header, *lines]) + "\n"


def replace(labels: dict[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Return an edit that gives labels other numbers."""
    lookup = np.arange(256, dtype=np.uint8)
    for old, new in labels.items():
        lookup[old] = new
    return lambda array: lookup[array]


def crop(root: Path) -> None:
    for path in [*maps(root, "validation"), *root.glob("images/validation/*.jpg")]:
        Image.open(path).crop((0, 0, 31, 37)).save(path)


def tear(pattern: str, keep: int) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        path = sorted(root.glob(pattern))[0]
        path.write_bytes(path.read_bytes()[:keep])

    return change


def save_16_bits(root: Path) -> None:
    path = maps(root)[0]
    Image.fromarray(read(path).astype(np.uint16)).save(path)


def save_grey_16_bits(root: Path) -> None:
    path = sorted(root.glob("images/training/*.jpg"))[0]
    Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, np.uint16)).save(path, "PNG")


def copy_as(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
            folder = root / kind / "training"
            (folder / f"0{suffix}").rename(folder / f"{name}{suffix}")

    return change


def nest(root: Path) -> None:
    for kind in ("images", "annotations"):
        folder = root / kind / "training"
        files = list(folder.iterdir())
        (folder / "a").mkdir()
        for path in files:
            path.rename(folder / "a" / path.name)


OFFICIAL = "Idx\tRatio\tTrain\tVal\tStuff\tName"
VARIANTS = [
    Variant("as-published", lambda root: None),
    Variant("official-table", write_info(table(*NAMES, header=OFFICIAL, row="{}\t0.1\t5\t2\t0\t{}"))),
    Variant(
        "column-after-the-name", write_info(table(*NAMES, header="Idx\tName\tColour", row="{}\t{}\tred"))
    ),
    Variant("windows-line-ends", write_info(table(*NAMES).replace("\n", "\r\n"))),
    Variant("byte-order-mark", write_info(table(*NAMES), "utf-8-sig")),
    Variant("spaces-around-names", write_info(table(*(f" {name} " for name in NAMES)))),
    Variant("unicode-names", write_info(table("ciel", "herbe verte", "boule à neige"))),
    Variant("names-with-synonyms", write_info(table("sky;heaven", "grass", "ball;sphere"))),
    Variant("palette-maps", add_palette),
    Variant("compressed-maps", compress_maps),
    Variant("ignored-frame-in-one-map", rewrite(lambda a: np.pad(a[4:-4, 4:-4], 4), first=1)),
    Variant("a-map-of-one-class", rewrite(lambda a: np.full_like(a, 2), "training", 1)),
    Variant("an-unlabelled-map", rewrite(np.zeros_like, "validation", 1)),
    Variant("nothing-ignored", rewrite(lambda a: np.maximum(a, 1))),
    Variant("class-only-in-training", rewrite(replace({3: 2}), "validation"), notes=1),
    Variant("class-only-in-validation", rewrite(replace({3: 2}), "training"), notes=1),
    Variant("other-size", crop),
    Variant("grey-images", convert_images("L")),
    Variant("cmyk-images", convert_images("CMYK")),
    Variant("png-named-jpg", convert_images("RGB", "PNG")),
    Variant("palette-png-named-jpg", convert_images("P", "PNG")),
    Variant("progressive-jpeg", save_images(progressive=True)),
    Variant("upright-exif", turn(1)),
    Variant("undefined-exif", turn(0)),
    Variant("unicode-file-name", copy_as("été")),
    Variant("spaces-in-a-file-name", copy_as("a b c")),
    Variant("dots-in-a-file-name", copy_as("v1.2.left")),
    Variant("other-files-in-a-folder", lambda root: (root / "images/training/list.txt").write_text("0.jpg")),
    Variant(
        "zero-based", rewrite(lambda a: np.maximum(a, 1) - 1), ("class 3 (ball)", "add 1 to every label")
    ),
    Variant("zero-based-255", rewrite(lambda a: a - 1), ("label 255", "add 1 to their labels first")),
    Variant("ignored-as-255", rewrite(replace({0: 255})), ("label 255", "write 0 where 255 means ignore")),
    Variant("one-map-of-255", rewrite(replace({0: 255}), "training", 1), ("label 255", "training/0.png")),
    Variant("a-label-too-many", rewrite(replace({3: 4})), ("label 4", "0 (ignore) to 3", "objectInfo")),
    Variant("labels-times-80", rewrite(lambda a: a * 80), ("label 240", "0 (ignore) to 3")),
    Variant("a-listed-class-is-absent", rewrite(replace({2: 1})), ("class 2 (grass)", "renumber the labels")),
    Variant("one-class-too-many", write_info(table(*NAMES, "tree")), ("class 4 (tree)", "remove class 4")),
    Variant("nothing-labelled", rewrite(np.zeros_like), ("no labelled pixel", "add 1")),
    Variant("validation-unlabelled", rewrite(np.zeros_like, "validation"), ("validation has no labelled",)),
    Variant("rgb-map", convert("RGB"), ("mode RGB", "8-bit")),
    Variant("bilevel-map", convert("1"), ("mode 1", "8-bit")),
    Variant("grey-alpha-map", convert("LA"), ("mode LA", "8-bit")),
    Variant("16-bit-map", save_16_bits, ("mode I;16", "8-bit")),
    Variant("16-bit-image", save_grey_16_bits, ("mode I;16", "8 bits per channel")),
    Variant("map-of-other-size", rewrite(lambda a: a[:, :-1], first=1), ("43 x 40", "44 x 40")),
    Variant("turned-map", rewrite(lambda a: a.T, "validation", 1), ("40 x 44", "44 x 40")),
    Variant("turned-exif", turn(6), ("orientation 6", "auto-orient")),
    Variant("mirrored-exif", turn(2), ("orientation 2", "auto-orient")),
    Variant("torn-map", tear("annotations/*/*.png", 60), ("cannot be read", "unpack them again")),
    Variant("empty-map", tear("annotations/*/*.png", 0), ("cannot be read", "unpack them again")),
    Variant("empty-image", tear("images/*/*.jpg", 0), ("cannot be read", "unpack them again")),
    Variant("png-images", rename("images/training/*.jpg", ".png"), ("not *.jpg", "JPEG")),
    Variant("jpeg-suffix", rename("images/training/*.jpg", ".jpeg"), ("not *.jpg", "rename")),
    Variant("jpeg-maps", rename("annotations/training/*.png", ".jpg"), ("not *.png", "JPEG changes them")),
    Variant("tif-maps", rename("annotations/training/*.png", ".tif"), ("annotations/training", "PNG")),
    Variant("nested-folders", nest, ("no images in", "training")),
    Variant("image-without-map", lambda root: maps(root)[0].unlink(), ("without a label map", "0")),
    Variant(
        "map-without-image",
        lambda root: next(root.glob("images/training/0.jpg")).unlink(),
        ("without an image",),
    ),
    Variant("no-table", lambda root: (root / "objectInfo.txt").unlink(), ("no objectInfo",)),
    Variant("empty-table", write_info(""), ("begins with", "Idx and Name")),
    Variant("table-without-header", write_info("1\tsky\n2\tgrass\n3\tball\n"), ("columns Idx and Name",)),
    Variant("table-with-commas", write_info(table(*NAMES).replace("\t", ",")), ("separated by tabs",)),
    Variant("table-from-0", write_info("Idx\tName\n0\tvoid\n1\tsky\n2\tgrass\n"), ("1, 2, ...", "label 0")),
    Variant("a-gap-in-the-table", write_info("Idx\tName\n1\tsky\n3\tball\n"), ("1, 2, ...",)),
    Variant("a-class-without-name", write_info(table("sky", "", "ball")), ("without a name: 1",)),
    Variant("a-name-twice", write_info(table("sky", "sky", "ball")), ("repeated names: sky",)),
    Variant("too-many-classes", write_info(table(*map(str, range(300)))), ("300 classes", "254")),
    Variant("latin-1-table", write_info(table("café", *NAMES[1:]), "latin-1"), ("UTF-8", "iconv")),
]


def build_datasets(layout: LayoutReport, folder: Path) -> dict[str, ADE20KLayout]:
    """Return the datasets that a job on this data builds, by split."""
    settings = {
        "kind": "upernet",
        "protocol": "test",
        "data": str(layout.root),
        "crop_size": 32,
        "img_scale": [64, 40],
        "iterations": 1,
        "warmup_iterations": 0,
        "test_mode": "whole",
    }
    config = UPerNetConfig.model_validate(settings)
    job = Job("segment", "upernet", {}, folder, 0, "unused")
    spec = BackboneSpec("vit", (32, 32), (8, 8), 3, embed_dim=16, depth=4, num_heads=2, pos_embed="sincos")
    context = TaskContext(config, job, Progress(), layout, spec, ConversionReport("", "", ""))
    parts = build_mmseg_config(context)
    made = {}
    for split, loader in (("training", "train_dataloader"), ("validation", "val_dataloader")):
        with DefaultScope.overwrite_default_scope("mmseg"):
            made[split] = DATASETS.build(parts[loader]["dataset"])
    return made


def score_perfectly(dataset: ADE20KLayout, num_classes: int) -> float:
    """Return the mIoU of predictions that are the labels, read without mmsegmentation."""
    metric = ExactIoUMetric(ignore_index=255)
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        sample = dataset[i]["data_samples"]
        labels = read(Path(sample.seg_map_path)).astype(np.int64)
        predicted = torch.from_numpy(np.where(labels > 0, labels - 1, num_classes - 1))
        found = SegDataSample(gt_sem_seg=sample.gt_sem_seg, pred_sem_seg=PixelData(data=predicted[None]))
        metric.process({}, [found.to_dict()])
    return metric.compute_metrics(metric.results)["mIoU"]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variant(variant: Variant, ade20k: Path, tmp_path: Path) -> None:
    variant.change(ade20k)
    if variant.words is not None:
        with pytest.raises(UserError) as caught:
            check_layout("ade20k", ade20k)
        message = str(caught.value)
        assert str(ade20k) in message
        assert "Next:" in message
        for word in variant.words:
            assert word in message
        return
    layout = check_layout("ade20k", ade20k)
    assert len(layout.notes) == variant.notes
    counts = np.sum([np.bincount(read(path).ravel(), minlength=4) for path in maps(ade20k)], axis=0)
    assert np.sum(list(layout.labels.values()), axis=0).tolist() == counts.tolist()
    datasets = build_datasets(layout, tmp_path)
    for i in range(len(datasets["training"])):
        labels = datasets["training"][i]["data_samples"].gt_sem_seg.data
        assert set(labels.unique().tolist()) <= {0, 1, 2, 255}
    assert score_perfectly(datasets["validation"], len(layout.classes)) == 100
