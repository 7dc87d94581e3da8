"""Generate the demo data sets in the ImageNet, COCO and ADE20K layouts with one scene generator."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from mae_bench.config import Config
from mae_bench.data.demo.outlines import encode_run_lengths, find_box, trace_polygons
from mae_bench.data.demo.scenes import (
    GENERATOR_VERSION,
    STUFF,
    THINGS,
    Recipe,
    Scene,
    Thing,
    build_rng,
    make_scene,
)
from mae_bench.errors import UserError
from mae_bench.files import json_digest, write_json, write_text
from mae_bench.progress import Progress

STAMP = "dataset.json"
# With gaps, as in COCO: this reveals readers that assume 1, 2, 3, ...
CATEGORY_IDS = (1, 2, 3, 5, 8, 13, 18, 27, 44, 90)
MIN_AREA = 24  # visible pixels of an annotated thing
MIN_VISIBLE = 0.25  # visible fraction of an annotated thing


class DemoSet(Config):
    """Size of one data set: pixels per side, images per split."""

    img_size: int = Field(gt=15)
    num_train: int = Field(gt=0)
    num_val: int = Field(gt=0)


class DemoConfig(Config):
    """The three data sets of the demo; ImageNet's classes are balanced if the numbers are multiples of 10."""

    seed: int = 0
    imagenet: DemoSet = DemoSet(img_size=64, num_train=4000, num_val=1000)
    coco: DemoSet = DemoSet(img_size=128, num_train=320, num_val=80)
    ade20k: DemoSet = DemoSet(img_size=128, num_train=320, num_val=80)


def make_demo_data(root: Path, config: DemoConfig, progress: Progress | None = None) -> None:
    """Write `root/{imagenet,coco,ade20k}`, unless `root` already holds them.

    The data is written next to `root` and renamed when complete: an interrupted call leaves no `root`, and
    the next call starts again. Raises UserError if `root` holds anything else.
    """
    stamp = {
        "name": "demo",
        "digest": json_digest(config.model_dump()),
        "generator_version": GENERATOR_VERSION,
    }
    if _is_made(root, stamp):
        return
    part = root.with_name(f".{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    counter = _Counter(progress or Progress(), config)
    for name, write in WRITERS.items():
        size: DemoSet = getattr(config, name)
        write(part / name, size, config.seed, counter)
        write_json(part / name / STAMP, {"name": f"demo-{name}"})
    write_json(part / STAMP, {**stamp, "config": config.model_dump()})
    part.replace(root)


def _is_made(root: Path, stamp: dict[str, Any]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / STAMP).read_text(encoding="utf-8"))
        same = {key: found.get(key) for key in stamp} == stamp
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"{root} holds something other than demo data",
            expected="a folder that is empty or does not exist",
            fix="choose another folder",
        ) from None
    if not same:
        raise UserError(
            f"{root} holds demo data of another config or version (see its {STAMP})",
            expected=f"digest {stamp['digest'][:12]}, generator version {GENERATOR_VERSION}",
            fix=f"choose another folder, or remove {root}",
        )
    return True


class _Counter:
    """Count the images of all three data sets."""

    def __init__(self, progress: Progress, config: DemoConfig):
        self._progress, self._done = progress, 0
        sets = (config.imagenet, config.coco, config.ade20k)
        progress.stage("data", total=sum(size.num_train + size.num_val for size in sets))

    def step(self) -> None:
        self._done += 1
        self._progress.step(self._done)


def build_dense_recipe(img_size: int) -> Recipe:
    """Return the recipe of COCO and ADE20K: several things, some crowds, mostly typical ground colours."""
    return Recipe(img_size, turn=np.pi / 4, crowd_share=0.25, ground_colour=0.8)


def _write_imagenet(root: Path, size: DemoSet, seed: int, counter: _Counter) -> None:
    recipe = Recipe(
        size.img_size, num_things=(1, 1), radius=(0.24, 0.46), turn=np.pi / 5, max_grounds=2, max_bars=1
    )
    for split, num_images in (("train", size.num_train), ("val", size.num_val)):
        for i in range(num_images):
            label = i % len(THINGS)
            scene = make_scene(build_rng(seed, "imagenet", split, i), recipe, label)
            _save_jpeg(scene, root / split / THINGS[label] / f"{THINGS[label]}_{i:06d}.JPEG")
            counter.step()


def _write_coco(root: Path, size: DemoSet, seed: int, counter: _Counter) -> None:
    recipe = build_dense_recipe(size.img_size)
    for split, num_images, first in (("train2017", size.num_train, 1), ("val2017", size.num_val, 500_001)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(num_images):
            scene = make_scene(build_rng(seed, "coco", split, i), recipe)
            name, side = f"{first + i:012d}.jpg", size.img_size
            images.append({"id": first + i, "file_name": name, "height": side, "width": side, "license": 1})
            for thing in select_annotated(scene):
                ids = {"id": 10 * first + len(annotations), "image_id": first + i}
                annotations.append({**ids, **_annotate(thing)})
            _save_jpeg(scene, root / split / name)
            counter.step()
        text = json.dumps(_build_instances(images, annotations))
        write_text(root / "annotations" / f"instances_{split}.json", text)


def _build_instances(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    numbered = zip(CATEGORY_IDS, THINGS, strict=True)
    categories = [{"id": number, "name": name, "supercategory": "shape"} for number, name in numbered]
    return {
        "info": {"description": "procedural scenes of mae_bench", "version": str(GENERATOR_VERSION)},
        "licenses": [{"id": 1, "name": "Apache-2.0", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def select_annotated(scene: Scene) -> list[Thing]:
    """Return the things that are visible enough to be recognised."""
    return [thing for thing in scene.things if thing.area >= max(MIN_AREA, MIN_VISIBLE * thing.full_area)]


def _annotate(thing: Thing) -> dict[str, Any]:
    """Return COCO's annotation without ids: run lengths for a crowd, else the visible outline."""
    segmentation = encode_run_lengths(thing.mask) if thing.crowd else trace_polygons(thing.mask)
    return {
        "category_id": CATEGORY_IDS[thing.label],
        "iscrowd": int(thing.crowd),
        "area": float(thing.area),
        "bbox": find_box(thing.mask),
        "segmentation": segmentation,
    }


def _write_ade20k(root: Path, size: DemoSet, seed: int, counter: _Counter) -> None:
    recipe = build_dense_recipe(size.img_size)
    for split, num_images in (("training", size.num_train), ("validation", size.num_val)):
        (root / "annotations" / split).mkdir(parents=True)
        for i in range(num_images):
            scene = make_scene(build_rng(seed, "ade20k", split, i), recipe)
            name = f"DEMO_{'train' if split == 'training' else 'val'}_{i + 1:08d}"
            _save_jpeg(scene, root / "images" / split / f"{name}.jpg")
            Image.fromarray(draw_label_map(scene)).save(root / "annotations" / split / f"{name}.png")
            counter.step()
    rows = [f"{number}\t{name}" for number, name in enumerate((*STUFF, *THINGS), start=1)]
    write_text(root / "objectInfo.txt", "\n".join(["Idx\tName", *rows]) + "\n")


def draw_label_map(scene: Scene) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return labels, uint8 (H, W): 0 for void (seams, poles, hidden things), then stuff, then things."""
    labels = scene.stuff.copy()
    annotated = {id(thing) for thing in select_annotated(scene)}
    for thing in scene.things:
        labels[thing.mask] = 1 + len(STUFF) + thing.label if id(thing) in annotated else 0
    return labels


def _save_jpeg(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(path, "JPEG", quality=92)


WRITERS: dict[str, Callable[[Path, DemoSet, int, _Counter], None]] = {
    "imagenet": _write_imagenet,
    "coco": _write_coco,
    "ade20k": _write_ade20k,
}
