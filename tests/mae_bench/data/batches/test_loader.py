"""Order, augmentation and exactness of the batches."""

import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_bench.data.batches.loader import Batch, TrainingOrder, load_evaluation_batches, load_training_batches
from mae_bench.data.batches.transforms import PretrainTransform, build_eval_transform, build_train_transform
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> ImageSource:
    """Return 14 images of 2 classes whose red channel is the number of the image."""
    for number in range(14):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return open_images(tmp_path, "train")


def test_every_image_once_an_epoch_over_any_number_of_processes() -> None:
    for world_size in (1, 2, 4):
        orders = [
            TrainingOrder(18, 8, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        steps = [
            [
                sorted(i for order in parts for _, i, _ in order)
                for parts in zip(*(list(o.batches(0, 4)) for o in orders), strict=True)
            ]
        ]
        if world_size == 1:
            whole = steps
        assert steps == whole, "the same global batches"
        first_epoch = [i for step in steps[0][:2] for i in step]
        assert len(set(first_epoch)) == 16


def test_order_starts_anywhere() -> None:
    order = TrainingOrder(18, 8, seed=3)
    assert list(order.batches(0, 7))[3:] == list(order.batches(3, 7))


def test_micro_batches_are_the_batch_in_parts(images: ImageSource) -> None:
    transform = PretrainTransform((16, 16))
    for rank in (0, 1):
        whole = TrainingOrder(len(images), 10, 3, rank, 2)
        parts = TrainingOrder(len(images), 10, 3, rank, 2, sizes=(2, 2, 1))
        batches = list(load_training_batches(images, transform, whole, 1, 3, num_workers=0))
        small = list(load_training_batches(images, transform, parts, 1, 3, num_workers=2))
        assert [batch.start for batch in batches] == [5 * rank] * 2
        assert [batch.start for batch in small] == [5 * rank, 5 * rank + 2, 5 * rank + 4] * 2
        for number, batch in enumerate(batches):
            mine = small[3 * number : 3 * number + 3]
            assert torch.equal(torch.cat([part.imgs for part in mine]), batch.imgs)
            assert torch.equal(torch.cat([part.indices for part in mine]), batch.indices)


def test_order_changes_with_epoch_and_seed() -> None:
    order = list(TrainingOrder(16, 16, seed=3).batches(0, 2))
    assert [i for _, i, _ in order[0]] != [i for _, i, _ in order[1]]
    assert order[0] != list(TrainingOrder(16, 16, seed=4).batches(0, 1))[0]


def test_batches_too_large_or_indivisible_are_refused() -> None:
    with pytest.raises(UserError, match="global_batch_size 32 with 16"):
        TrainingOrder(16, 32, seed=0)
    with pytest.raises(UserError, match="on 3 processes"):
        TrainingOrder(16, 8, seed=0, world_size=3)


def test_augmentation_depends_on_the_image_and_epoch_not_on_the_loader(images: ImageSource) -> None:
    transform = build_train_transform((16, 16), (0.2, 1.0), auto_augment="rand-m9-mstd0.5-inc1")
    order = TrainingOrder(len(images), 7, seed=1)
    alone = list(load_training_batches(images, transform, order, 0, 4, num_workers=0))
    torch.manual_seed(99)  # other random draws of the process have no effect
    workers = list(load_training_batches(images, transform, order, 1, 4, num_workers=2))
    for batch, other in zip(alone[1:], workers, strict=True):
        assert torch.equal(batch.imgs, other.imgs)
        assert torch.equal(batch.indices, other.indices)
    assert alone[0].imgs.dtype == torch.uint8
    first, second = (dict(zip(b.indices.tolist(), b.imgs, strict=True)) for b in (alone[0], alone[2]))
    shared = first.keys() & second.keys()
    assert any(not torch.equal(first[i], second[i]) for i in shared), "another epoch, another crop"


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_sees_each_image_once(images: ImageSource, world_size: int, batch_size: int) -> None:
    seen = []
    for rank in range(world_size):
        for batch in load_evaluation_batches(
            images, build_eval_transform((16, 16)), batch_size, 0, rank, world_size
        ):
            seen += batch.indices.tolist()
            assert batch.targets.tolist() == [images.targets[i] for i in batch.indices.tolist()]
    assert sorted(seen) == list(range(14))


def test_bad_image_gives_its_place_in_training_and_none_in_evaluation(
    images: ImageSource, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20)).save(buffer, format="PNG")
    (tmp_path / "train" / "class0" / "04.png").write_bytes(buffer.getvalue()[:40])
    order = TrainingOrder(len(images), 14, seed=1)
    batch = next(load_training_batches(images, build_eval_transform((16, 16)), order, 0, 1, 0))
    assert len(batch.imgs) == 14
    assert [Path(name).name for name, _ in batch.bad] == ["04.png"]
    evaluated = list(load_evaluation_batches(images, build_eval_transform((16, 16)), 5, 0))
    assert sum(len(b.targets) for b in evaluated) == 13
    assert sum(len(b.bad) for b in evaluated) == 1


def test_a_file_that_cannot_be_read_counts_as_bad(images: ImageSource, tmp_path: Path) -> None:
    (tmp_path / "train" / "class0" / "04.png").unlink()
    batches = list(load_evaluation_batches(images, build_eval_transform((16, 16)), 5, 0))
    assert [Path(name).name for batch in batches for name, _ in batch.bad] == ["04.png"]


def test_a_long_run_is_not_laid_out_in_memory(images: ImageSource) -> None:
    order = TrainingOrder(len(images), 7, seed=1)
    assert (
        len(
            next(
                load_training_batches(images, build_eval_transform((16, 16)), order, 0, 10**12, num_workers=0)
            ).targets
        )
        == 7
    )


def test_evaluation_resizes_the_short_side_and_crops_the_centre() -> None:
    ramp = np.tile(np.arange(80, dtype=np.uint8)[None, :, None], (64, 1, 3))
    out = build_eval_transform((56, 56), crop_pct=0.875)(Image.fromarray(ramp))
    assert out.shape == (3, 56, 56)
    assert out[0, 0, 0] == 12, "(80 - 56) / 2 columns are cut on the left"


@pytest.mark.parametrize("crop_on", ["cpu", "device"])
def test_pretraining_batches_depend_on_the_step_alone(images: ImageSource, crop_on: str) -> None:
    transform = PretrainTransform((16, 16), crop_on=crop_on)  # type: ignore[arg-type]
    whole = list(
        load_training_batches(images, transform, TrainingOrder(len(images), 6, seed=1), 0, 4, num_workers=0)
    )
    for world_size, num_workers in [(1, 2), (2, 1), (3, 0)]:
        orders = [TrainingOrder(len(images), 6, 1, rank, world_size) for rank in range(world_size)]
        ranks = [list(load_training_batches(images, transform, order, 1, 4, num_workers)) for order in orders]
        for step, batch in enumerate(whole[1:]):
            parts = [rank[step] for rank in ranks]
            assert [part.start for part in parts] == [6 // world_size * rank for rank in range(world_size)]
            assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)
            if crop_on == "cpu":
                assert torch.equal(torch.cat([part.imgs for part in parts]), batch.imgs)
                assert batch.imgs.shape == (6, 3, 16, 16)
                assert batch.imgs.dtype == torch.uint8
            else:
                assert batch.crops is not None
                assert torch.equal(
                    torch.cat([part.crops for part in parts if part.crops is not None]), batch.crops
                )
                assert all(0 < height <= 24 and 0 < width <= 20 for height, width, *_ in batch.crops.tolist())


def test_a_batch_splits_into_consecutive_parts() -> None:
    batch = Batch(
        torch.arange(5).view(5, 1, 1, 1),
        torch.arange(5),
        torch.arange(5) * 2,
        [("a", "b")],
        10,
        torch.arange(5)[:, None],
    )
    parts = list(batch.split([2, 3]))
    assert [part.start for part in parts] == [10, 12]
    assert [part.targets.tolist() for part in parts] == [[0, 1], [2, 3, 4]]
    assert [part.crops.flatten().tolist() for part in parts if part.crops is not None] == [[0, 1], [2, 3, 4]]
    assert not any(part.bad for part in parts)


class Arrays(ImageSource):
    """A source of arrays in memory: raw pixels, or .npy files."""

    classes, digest = [""], "0" * 64
    targets = np.zeros(1000, np.int32)

    def __init__(self, arrays: list[np.ndarray], raw: bool = False):
        self.arrays, self.raw = arrays, raw

    def __len__(self) -> int:
        return len(self.arrays)

    def name(self, i: int) -> str:
        """Return the number of the image."""
        return f"{i}.npy"

    def pixels(self, i: int) -> np.ndarray | None:
        """Return the array, or None."""
        return self.arrays[i] if self.raw else None

    def read(self, i: int) -> bytes:
        """Return the array as a file."""
        buffer = io.BytesIO()
        np.save(buffer, self.arrays[i])
        return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_multispectral_arrays_travel_in_their_dtype(dtype: str) -> None:
    source = Arrays([np.full((20, 24, 6), 10 * i, dtype) for i in range(8)])
    order = TrainingOrder(8, 4, seed=0)
    batch = next(load_training_batches(source, PretrainTransform((16, 16), in_chans=6), order, 0, 1, 0))
    assert batch.imgs.shape == (4, 6, 16, 16)
    assert str(batch.imgs.dtype) == f"torch.{dtype}"
    assert batch.imgs[:, 0, 0, 0].tolist() == pytest.approx([10 * int(i) for i in batch.indices])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_grey_images_of_several_depths_are_refused(tmp_path: Path, num_workers: int) -> None:
    for name, dtype in (("a.png", np.uint8), ("b.png", np.uint16)):
        Image.fromarray(np.full((20, 20), 200, dtype)).save(tmp_path / name)
    images, transform = open_images(tmp_path, "train"), PretrainTransform((16, 16), in_chans=1)
    order = TrainingOrder(len(images), 2, seed=0)
    with pytest.raises(UserError) as caught:
        list(load_training_batches(images, transform, order, 0, 1, num_workers=num_workers))
    for word in ("a.png is uint8", "b.png is uint16", "convert the images to one depth"):
        assert word in str(caught.value)
    (batch,) = load_training_batches(images, PretrainTransform((16, 16)), order, 0, 1, num_workers=0)
    assert batch.imgs[:, :, 0, 0].tolist() in ([[200] * 3, [0] * 3], [[0] * 3, [200] * 3])


def test_raw_pixels_serve_every_transform() -> None:
    source = Arrays(
        [np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8) for i in range(4)], raw=True
    )
    for transform in (
        PretrainTransform((16, 16)),
        build_train_transform((16, 16), (0.2, 1.0)),
        build_eval_transform((16, 16)),
    ):
        batch = next(load_training_batches(source, transform, TrainingOrder(4, 4, seed=0), 0, 1, 0))
        assert batch.imgs.shape == (4, 3, 16, 16)
        assert not batch.bad


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_set_of_other_channels_is_one_clear_error(num_workers: int) -> None:
    source = Arrays([np.zeros((20, 24, 2), np.uint8)] * 150)
    batches = load_training_batches(
        source, PretrainTransform((16, 16), in_chans=5), TrainingOrder(150, 4, 0), 0, 2, num_workers
    )
    with pytest.raises(
        UserError, match=r"none of 100 images in a row.*\(20, 24, 2\) of uint8, the model takes 5 channels"
    ) as caught:
        next(batches)
    assert "Traceback" not in str(caught.value)


class Deadly:
    """A transform that ends its own process."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.empty(0)


class Full:
    """A transform that fails like a full /dev/shm."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")


def test_a_lost_worker_is_one_clear_error(images: ImageSource) -> None:
    order = TrainingOrder(len(images), 7, seed=1)
    with pytest.raises(UserError, match="a loader process was lost.*(Killed|exited unexpectedly)") as caught:
        next(load_training_batches(images, Deadly(), order, 0, 2, num_workers=1))
    assert "num_workers" in caught.value.fix
    with pytest.raises(UserError, match="No space left") as caught:
        next(load_training_batches(images, Full(), order, 0, 2, num_workers=1))
    assert "shm" in caught.value.fix


def test_a_mistake_in_the_code_is_not_called_a_lost_worker(images: ImageSource) -> None:
    def broken(image: Image.Image) -> torch.Tensor:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        next(
            load_training_batches(images, broken, TrainingOrder(len(images), 7, seed=1), 0, 2, num_workers=1)
        )


class Signalled:
    """A transform during which a launcher signals every process to stop."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return torch.zeros(3, 4, 4, dtype=torch.uint8)


def test_workers_leave_the_answer_to_a_stop_to_their_main_process(images: ImageSource) -> None:
    batches = load_training_batches(
        images, Signalled(), TrainingOrder(len(images), 7, seed=1), 0, 2, num_workers=1
    )
    assert [len(batch.targets) for batch in batches] == [7, 7]
