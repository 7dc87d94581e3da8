"""COCO for detectron2: registered splits, large-scale jitter, and loaders that resume and skip bad images."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import SizeMismatchError, check_image_size, read_image
from detectron2.data.samplers import TrainingSampler
from PIL import Image
from torch.utils.data import Dataset

from mae_bench.data.checks.coco import SPLITS
from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.data.sets.source import BadImages
from mae_bench.errors import UserError
from mae_bench.files import json_digest
from tasks.coco.annotations import prepare_annotations
from tasks.coco.config import MaskRCNNConfig

Sample = dict[str, Any]
# SyntaxError: a broken PNG
READ_ERRORS = (OSError, SyntaxError, EOFError, Image.DecompressionBombError, SizeMismatchError)
STEP, SAMPLE = 0, 1  # streams of derive_seed: the model's step, the augmentation of a sample


@dataclass(frozen=True)
class CocoNames:
    """detectron2's names of the two registered splits, and their number of classes."""

    train: str
    val: str
    num_classes: int


def register(root: Path, digest: str, folder: Path) -> CocoNames:
    """Register `root` (train2017/, val2017/, annotations/) under names unique to its path and content.

    Repaired copies of annotation files go to `folder`. Raise UserError if the splits list different
    categories: detectron2 maps category ids to 0..K-1 per split.
    """
    key = json_digest([str(root.resolve()), digest, str(folder.resolve())])[:16]
    train, val = (f"coco_{key}_{split}" for split in ("train", "val"))
    for name, split in zip((train, val), SPLITS, strict=True):
        annotations = prepare_annotations(root, split, folder)
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, str(annotations), str(root / split))
        DatasetCatalog.get(name)  # fills the metadata
    ids, val_ids = (MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id for name in (train, val))
    if ids != val_ids:
        raise UserError(
            f"{root}: the splits list different categories, {sorted(ids)} and {sorted(val_ids)}",
            expected="the same `categories` in both annotation files",
        )
    return CocoNames(train, val, len(ids))


def get_annotations(name: str) -> Path:
    """Return the annotation file that a registered split is read from."""
    return Path(MetadataCatalog.get(name).json_file)


def find_unreadable(name: str, bad: BadImages) -> None:
    """Decode each image of a registered split and add those that cannot be read to `bad`.

    Before training, so that an unreadable image of the split to score does not come out at its end.
    """
    for sample in get_detection_dataset_dicts(name, filter_empty=False):
        try:
            check_image_size(sample, read_image(sample["file_name"], format="RGB"))
        except READ_ERRORS as error:
            bad.add(sample["file_name"], str(error))


class NameBadImages:
    """A DatasetMapper that returns the name of an image which cannot be read, instead of failing."""

    def __init__(self, mapper: DatasetMapper):
        self.mapper = mapper

    def __call__(self, sample: Sample) -> Sample:
        try:
            mapped: Sample = self.mapper(sample)
        except READ_ERRORS as error:
            return {"bad_image": sample["file_name"], "reason": str(error)}
        return mapped


class TrainingStream(Dataset[Sample]):
    """Mapped images by address, position * num_images + index.

    The position in the whole training seeds the augmentation.
    """

    def __init__(self, dicts: list[Sample], mapper: NameBadImages, seed: int):
        self.dicts, self.mapper, self.seed = DatasetFromList(dicts, copy=False), mapper, seed

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, address: int) -> Sample:
        position, index = divmod(address, len(self.dicts))
        seed_everything(derive_seed(self.seed, SAMPLE, position))
        return self.mapper(self.dicts[index])


class ContinuedSampler(TrainingSampler):
    """detectron2's endless shuffled stream from image `start` on, as addresses of a `TrainingStream`."""

    def __init__(self, size: int, seed: int, start: int):
        super().__init__(size, seed=seed)
        self.start = start

    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(islice(super().__iter__(), self.start, None), self.start):
            yield position * self._size + index


class GoodImages:
    """Batches of `loader` without the images that cannot be read, which are added to `bad`.

    A seed fixes the randomness of each step.
    """

    def __init__(self, loader: Any, bad: BadImages, seed: int | None = None, first_step: int = 0):
        self.loader, self.bad, self.seed, self.first_step = loader, bad, seed, first_step

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        for step, batch in enumerate(self.loader, self.first_step):
            for sample in batch:
                if "bad_image" in sample:
                    self.bad.add(sample["bad_image"], sample["reason"])
            # Drop path and proposal sampling depend on the step, not on the number of loader processes.
            if self.seed is not None:
                seed_everything(derive_seed(self.seed, STEP, step))
            good = [sample for sample in batch if "bad_image" not in sample]
            if good:
                yield good


def build_train_loader(
    config: MaskRCNNConfig, name: str, bad: BadImages, seed: int, start: int
) -> GoodImages:
    """Return batches from iteration `start` on, whatever ran before and however many workers load them.

    Flip, scale jitter and crop as in detectron2's coco_loader_lsj; images without objects are left out.
    """
    dicts = get_detection_dataset_dicts(name, filter_empty=True)
    size = config.img_size
    mapper = DatasetMapper(
        is_train=True,
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format=_find_mask_format(dicts),
        recompute_boxes=True,
        augmentations=[
            T.RandomFlip(horizontal=True),
            T.ResizeScale(*config.scale_range, target_height=size, target_width=size),
            T.FixedSizeCrop((size, size), pad=False),
        ],
    )
    loader = build_detection_train_loader(
        TrainingStream(dicts, NameBadImages(mapper), seed),
        mapper=None,
        sampler=ContinuedSampler(len(dicts), seed, start * config.global_batch_size),
        total_batch_size=config.global_batch_size,
        aspect_ratio_grouping=False,
        num_workers=config.num_workers,
        seed=seed,
    )
    return GoodImages(loader, bad, seed, start)


def build_val_loader(config: MaskRCNNConfig, name: str, bad: BadImages) -> GoodImages:
    """Return batches with every image of the split once, its longer side scaled to img_size."""
    dicts = get_detection_dataset_dicts(name, filter_empty=False)
    mapper = DatasetMapper(
        is_train=False,
        image_format="RGB",
        augmentations=[T.ResizeShortestEdge(config.img_size, max_size=config.img_size)],
    )
    loader = build_detection_test_loader(
        dicts, mapper=NameBadImages(mapper), batch_size=config.eval_batch_size, num_workers=config.num_workers
    )
    return GoodImages(loader, bad)


def _find_mask_format(dicts: list[Sample]) -> str:
    """Return "polygon" (cheaper) if all objects have polygons, else "bitmask"; crowds are not trained on."""
    for image in dicts:
        for annotation in image["annotations"]:
            crowd = annotation.get("iscrowd", 0)
            if not crowd and isinstance(annotation.get("segmentation"), dict):
                return "bitmask"
    return "polygon"
