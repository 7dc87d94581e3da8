"""The ADE20K layout for mmsegmentation: a stream that resumes exactly and leaves out undecodable images."""

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
from mae_bench.data.sets.source import BadImages

READ_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)  # SyntaxError: a broken PNG
STEP, SAMPLE = 0, 1  # streams of derive_seed: the model's step, the augmentation of a sample


class SharedBadImages:
    """BadImages of a split over loader processes.

    Each process appends to a file; the training process counts what it reads there.
    """

    def __init__(self, path: Path, limit: float, total: int):
        self.path, self.counted = path, BadImages(limit, total)

    def add(self, name: str, reason: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{name}\t{reason}\n")

    def check(self) -> BadImages:
        """Return all bad images found so far; raise UserError if they are too many."""
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                name, _, reason = line.partition("\t")
                self.counted.add(name, reason)
        return self.counted


@DATASETS.register_module()
class ADE20KLayout(BaseSegDataset):
    """One split of `images|annotations/training|validation`.

    Label 0 is ignored (255 for the model), label i is class i - 1. Images are addressed by position *
    num_images + index (see `AddressSampler`): the position in the whole training seeds the augmentation. In
    training, another image replaces one that does not decode; in validation it is left out.
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
            data_root=data_root,
            data_prefix={"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"},
            metainfo={"classes": tuple(classes)},
            reduce_zero_label=True,
            **kwargs,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        images: list[dict[str, Any]] = super().load_data_list()
        self.bad = SharedBadImages(self.bad_file, self.max_bad_images, len(images))
        if not self.test_mode:
            return images
        good = [info for info in images if not self._name_unreadable(info)]
        self.bad.check()
        return good

    def __getitem__(self, address: int) -> dict[str, Any]:
        position, index = divmod(address, len(self))
        seed_everything(derive_seed(self.seed, SAMPLE, position))
        sample: dict[str, Any] = super().__getitem__(index)
        return sample

    def prepare_data(self, idx: int) -> dict[str, Any] | None:
        """Return the packed sample, or None, for which mmengine draws another image."""
        try:
            sample: dict[str, Any] | None = super().prepare_data(idx)
        except READ_ERRORS:
            if not self._name_unreadable(self.get_data_info(idx)):
                raise
            # In a loader process the error would come with its traceback: there, the hook checks.
            if get_worker_info() is None:
                self.bad.check()
            return None
        return sample

    def _name_unreadable(self, info: dict[str, Any]) -> bool:
        """Return whether the image or its labels do not decode, and add them to the bad images."""
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
    """mmengine's endless shuffled stream as addresses of an `ADE20KLayout`."""

    position = 0

    def skip(self, num_samples: int) -> None:
        super().skip(num_samples)
        self.position = num_samples

    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(super().__iter__(), self.position):
            yield position * self.size + index
