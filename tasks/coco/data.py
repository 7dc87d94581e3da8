"""COCO for detectron2: registered splits, large-scale jitter, and loaders that resume exactly and survive bad images."""

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
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import TrainingSampler
from PIL import Image
from torch.utils.data import Dataset

from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.data.sets.source import BadImages
from mae_bench.errors import UserError
from mae_bench.files import json_digest
from tasks.coco.config import MaskRCNNConfig

Sample = dict[str, Any]
READ_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
    SizeMismatchError,
)  # SyntaxError: a broken PNG
STEP, SAMPLE = 0, 1  # derive_seed's streams: randomness of the model's step, of a sample's augmentation


@dataclass(frozen=True)
class CocoNames:
    """detectron2's names of the two registered splits, and how many classes they have."""

    train: str
    val: str
    num_classes: int


def register(root: Path, digest: str) -> CocoNames:
    """Registers `root` (train2017/, val2017/, annotations/) under names unique to its place and content.

    detectron2 maps category ids to 0..K-1 split by split, so both splits must list the same categories: else UserError.
    """
    key = json_digest([str(root.resolve()), digest])[:16]
    train, val = (f"coco_{key}_{split}" for split in ("train", "val"))
    for name, split in ((train, "train2017"), (val, "val2017")):
        if name not in DatasetCatalog.list():
            register_coco_instances(
                name, {}, str(root / "annotations" / f"instances_{split}.json"), str(root / split)
            )
        DatasetCatalog.get(name)  # fills the metadata
    ids, val_ids = (MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id for name in (train, val))
    if ids != val_ids:
        raise UserError(
            f"{root}: the splits list different categories, {sorted(ids)} and {sorted(val_ids)}",
            expected="the same `categories` in both annotation files",
        )
    return CocoNames(train, val, len(ids))


class NameBadImages:
    """A DatasetMapper that hands an image which cannot be read on by its name instead of failing."""

    def __init__(self, mapper: DatasetMapper):
        self.mapper = mapper

    def __call__(self, sample: Sample) -> Sample:
        try:
            return self.mapper(sample)
        except READ_ERRORS as error:
            return {"bad_image": sample["file_name"], "reason": str(error)}


class TrainingStream(Dataset):
    """Mapped images addressed by position * num_images + index: the position in the whole training seeds the augmentation."""

    def __init__(self, dicts: list[Sample], mapper: NameBadImages, seed: int):
        self.dicts, self.mapper, self.seed = DatasetFromList(dicts, copy=False), mapper, seed

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, address: int) -> Sample:
        position, index = divmod(address, len(self.dicts))
        seed_everything(derive_seed(self.seed, SAMPLE, position))
        return self.mapper(self.dicts[index])


class ContinuedSampler(TrainingSampler):
    """detectron2's endless shuffled stream from its `start`-th image on, as the addresses of a `TrainingStream`."""

    def __init__(self, size: int, seed: int, start: int):
        super().__init__(size, seed=seed)
        self.start = start

    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(islice(super().__iter__(), self.start, None), self.start):
            yield position * self._size + index


class GoodImages:
    """Batches of `loader` without the images that cannot be read, which `bad` counts; a seed fixes each step's randomness."""

    def __init__(self, loader: Any, bad: BadImages, seed: int | None = None, first_step: int = 0):
        self.loader, self.bad, self.seed, self.first_step = loader, bad, seed, first_step

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        for step, batch in enumerate(self.loader, self.first_step):
            for sample in batch:
                if "bad_image" in sample:
                    self.bad.add(sample["bad_image"], sample["reason"])
            if (
                self.seed is not None
            ):  # drop path and proposal sampling follow from the step, whoever loaded it
                seed_everything(derive_seed(self.seed, STEP, step))
            if good := [sample for sample in batch if "bad_image" not in sample]:
                yield good


def train_loader(config: MaskRCNNConfig, name: str, bad: BadImages, seed: int, start: int) -> GoodImages:
    """Batches from iteration `start` on, the same whatever ran before and however many processes load them.

    Flip, scale jitter and crop as in detectron2's coco_loader_lsj; images without objects are left out.
    """
    dicts = get_detection_dataset_dicts(name, filter_empty=True)
    mapper = DatasetMapper(
        is_train=True, image_format="RGB", use_instance_mask=True, instance_mask_format=_mask_format(dicts), recompute_boxes=True,
        augmentations=[
            T.RandomFlip(horizontal=True),
            T.ResizeScale(*config.scale_range, target_height=config.img_size, target_width=config.img_size),
            T.FixedSizeCrop((config.img_size, config.img_size), pad=False),
        ],
    )  # fmt: skip
    loader = build_detection_train_loader(
        TrainingStream(dicts, NameBadImages(mapper), seed), mapper=None,
        sampler=ContinuedSampler(len(dicts), seed, start * config.global_batch_size),
        total_batch_size=config.global_batch_size, aspect_ratio_grouping=False, num_workers=config.num_workers, seed=seed,
    )  # fmt: skip
    return GoodImages(loader, bad, seed, start)


def val_loader(config: MaskRCNNConfig, name: str, bad: BadImages) -> GoodImages:
    """Every image of the split once, its longer side scaled to img_size."""
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


def _mask_format(dicts: list[Sample]) -> str:
    """Polygons where all objects have them (cheaper), else bitmaps; crowds are not trained on."""
    objects = (
        annotation
        for image in dicts
        for annotation in image["annotations"]
        if not annotation.get("iscrowd", 0)
    )
    return (
        "bitmask"
        if any(isinstance(annotation.get("segmentation"), dict) for annotation in objects)
        else "polygon"
    )
