"""ADE20K's layout for mmsegmentation: a stream that resumes exactly, and images that do not decode named and left out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import InfiniteSampler
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATA_SAMPLERS, DATASETS
from PIL import Image
from torch.utils.data import get_worker_info

from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.data.sets.source import BadImages, is_image
from mae_bench.errors import UserError

READ_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)  # SyntaxError: a broken PNG
STEP, SAMPLE = 0, 1  # derive_seed's streams: randomness of the model's step, of a sample's augmentation


class SharedBadImages:
    """BadImages of a split over loader processes: each appends to a file, and the training process counts what it reads there."""

    def __init__(self, path: Path, limit: float, total: int):
        self.path, self.counted = path, BadImages(limit, total)

    def add(self, name: str, reason: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{name}\t{reason}\n")

    def check(self) -> BadImages:
        """All that were found up to now; UserError if they are too many."""
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            name, _, reason = line.partition("\t")
            self.counted.add(name, reason)
        return self.counted


@DATASETS.register_module()
class ADE20KLayout(BaseSegDataset):
    """One split of `images|annotations/training|validation`: label 0 is ignored (255 to the model), label i is class i - 1.

    Images are addressed by position * num_images + index (see `AddressSampler`): the position in the whole training seeds the
    augmentation. One that does not decode gives its place to another in training; from a validation split it is left out.
    """

    def __init__(
        self,
        data_root: str,
        split: str,
        classes: list[str],
        bad_images: str,
        max_bad_images: float,
        seed: int,
        **kwargs: Any,
    ):
        self.seed, self.bad_file, self.max_bad_images = seed, Path(bad_images), max_bad_images
        super().__init__(
            data_root=data_root, data_prefix={"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"},
            metainfo={"classes": tuple(classes)}, reduce_zero_label=True, **kwargs,
        )  # fmt: skip

    def load_data_list(self) -> list[dict[str, Any]]:
        images, folder = super().load_data_list(), Path(self.data_prefix["img_path"])
        if strange := sorted(
            path.name for path in folder.iterdir() if is_image(path.name) and path.suffix != self.img_suffix
        ):
            raise UserError(f"{len(strange)} images in {folder} are not {self.img_suffix}: {strange[0]}",
                            expected="JPEG files named so, as in ADE20K", fix="convert or rename them")  # fmt: skip
        self.bad = SharedBadImages(self.bad_file, self.max_bad_images, len(images))
        if not self.test_mode:
            return images
        good = [info for info in images if not self._name_unreadable(info)]
        self.bad.check()
        return good

    def __getitem__(self, address: int) -> dict[str, Any]:
        position, index = divmod(address, len(self))
        seed_everything(derive_seed(self.seed, SAMPLE, position))
        return super().__getitem__(index)

    def prepare_data(self, idx: int) -> dict[str, Any] | None:
        """The packed sample, or None for mmengine to draw another image instead."""
        try:
            return super().prepare_data(idx)
        except READ_ERRORS:
            if not self._name_unreadable(self.get_data_info(idx)):
                raise
            if (
                get_worker_info() is None
            ):  # an error of a loader process would come with its traceback; the hook finds those
                self.bad.check()
            return None

    def _name_unreadable(self, info: dict[str, Any]) -> bool:
        for path in (info["img_path"], info["seg_map_path"]):
            try:
                with Image.open(path) as image:
                    np.asarray(image)
            except READ_ERRORS as error:
                self.bad.add(path, str(error).splitlines()[0])
                return True
        return False


@DATA_SAMPLERS.register_module()
class AddressSampler(InfiniteSampler):
    """mmengine's endless shuffled stream as the addresses of an `ADE20KLayout`."""

    position = 0

    def skip(self, num_samples: int) -> None:
        super().skip(num_samples)
        self.position = num_samples

    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(super().__iter__(), self.position):
            yield position * self.size + index
