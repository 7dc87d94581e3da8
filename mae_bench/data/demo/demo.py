"""Makes the demo's three data sets, in the true ImageNet, COCO and ADE20K layouts, from one scene generator."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from mae_bench.config import Config
from mae_bench.data.demo.outlines import box, polygons, run_lengths
from mae_bench.data.demo.scenes import (
    GENERATOR_VERSION,
    STUFF,
    THINGS,
    Recipe,
    Scene,
    Thing,
    make_scene,
    scene_rng,
)
from mae_bench.errors import UserError
from mae_bench.files import json_digest, write_json, write_text
from mae_bench.progress import Progress

STAMP = "dataset.json"
CATEGORY_IDS = (
    1,
    2,
    3,
    5,
    8,
    13,
    18,
    27,
    44,
    90,
)  # with gaps, as COCO's: a reader that counts on 1, 2, 3, ... shows
MIN_AREA, MIN_SHARE = 24, 0.25  # visible pixels, and of what occlusion hides: less is not annotated


class DemoSet(Config):
    """Size of one data set: pixels a side, images a split."""

    img_size: int = Field(gt=15)
    num_train: int = Field(gt=0)
    num_val: int = Field(gt=0)


class DemoConfig(Config):
    """The three data sets that the demo makes; ImageNet's classes have equally many images where the numbers divide by 10."""

    seed: int = 0
    imagenet: DemoSet = DemoSet(img_size=64, num_train=4000, num_val=1000)
    coco: DemoSet = DemoSet(img_size=128, num_train=320, num_val=80)
    ade20k: DemoSet = DemoSet(img_size=128, num_train=320, num_val=80)


def make_demo_data(root: Path, config: DemoConfig, progress: Progress | None = None) -> None:
    """Writes `root/{imagenet,coco,ade20k}`; returns at once if they are there.

    They are written beside `root` and renamed when complete, so that an interrupted call leaves no `root`, and the next one
    begins anew. UserError if `root` holds anything else.
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
            expected="a folder that does not exist, or an empty one",
            fix="choose another folder",
        ) from None
    if not same:
        raise UserError(
            f"{root} holds demo data of another config or version (its {STAMP} says which)",
            expected=f"digest {stamp['digest'][:12]}, generator version {GENERATOR_VERSION}",
            fix=f"choose another folder, or remove {root}",
        )
    return True


class _Counter:
    """Counts images over all three data sets."""

    def __init__(self, progress: Progress, config: DemoConfig):
        self._progress, self._done = progress, 0
        progress.stage(
            "data", total=sum(s.num_train + s.num_val for s in (config.imagenet, config.coco, config.ade20k))
        )

    def step(self) -> None:
        self._done += 1
        self._progress.step(self._done)


def dense_recipe(img_size: int) -> Recipe:
    """The scenes of COCO and ADE20K: several things, now and then a crowd, on grounds that mostly have their typical colour."""
    return Recipe(img_size, turn=np.pi / 4, crowd_share=0.25, ground_colour=0.8)


def _write_imagenet(root: Path, size: DemoSet, seed: int, counter: _Counter) -> None:
    recipe = Recipe(
        size.img_size, num_things=(1, 1), radius=(0.24, 0.46), turn=np.pi / 5, max_grounds=2, max_bars=1
    )
    for split, number in (("train", size.num_train), ("val", size.num_val)):
        for i in range(number):
            label = i % len(THINGS)
            scene = make_scene(scene_rng(seed, "imagenet", split, i), recipe, label)
            _save_jpeg(scene, root / split / THINGS[label] / f"{THINGS[label]}_{i:06d}.JPEG")
            counter.step()


def _write_coco(root: Path, size: DemoSet, seed: int, counter: _Counter) -> None:
    recipe = dense_recipe(size.img_size)
    for split, number, first in (("train2017", size.num_train, 1), ("val2017", size.num_val, 500_001)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(number):
            scene = make_scene(scene_rng(seed, "coco", split, i), recipe)
            name = f"{first + i:012d}.jpg"
            images.append(
                {
                    "id": first + i,
                    "file_name": name,
                    "height": size.img_size,
                    "width": size.img_size,
                    "license": 1,
                }
            )
            for thing in annotated(scene):
                annotations.append(
                    {"id": 10 * first + len(annotations), "image_id": first + i, **_annotation(thing)}
                )
            _save_jpeg(scene, root / split / name)
            counter.step()
        write_text(
            root / "annotations" / f"instances_{split}.json", json.dumps(_instances(images, annotations))
        )


def _instances(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    numbered = zip(CATEGORY_IDS, THINGS, strict=True)
    categories = [{"id": number, "name": name, "supercategory": "shape"} for number, name in numbered]
    return {
        "info": {"description": "procedural scenes of mae_bench", "version": str(GENERATOR_VERSION)},
        "licenses": [{"id": 1, "name": "Apache-2.0", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def annotated(scene: Scene) -> list[Thing]:
    """The things of which enough is visible to be told."""
    return [thing for thing in scene.things if thing.area >= max(MIN_AREA, MIN_SHARE * thing.full_area)]


def _annotation(thing: Thing) -> dict[str, Any]:
    """COCO's entry, without ids. A crowd is one region of many objects, as run lengths; all else is the visible outline."""
    segmentation = run_lengths(thing.mask) if thing.crowd else polygons(thing.mask)
    return {
        "category_id": CATEGORY_IDS[thing.label],
        "iscrowd": int(thing.crowd),
        "area": float(thing.area),
        "bbox": box(thing.mask),
        "segmentation": segmentation,
    }


def _write_ade20k(root: Path, size: DemoSet, seed: int, counter: _Counter) -> None:
    recipe = dense_recipe(size.img_size)
    for split, number in (("training", size.num_train), ("validation", size.num_val)):
        (root / "annotations" / split).mkdir(parents=True)
        for i in range(number):
            scene = make_scene(scene_rng(seed, "ade20k", split, i), recipe)
            name = f"DEMO_{'train' if split == 'training' else 'val'}_{i + 1:08d}"
            _save_jpeg(scene, root / "images" / split / f"{name}.jpg")
            Image.fromarray(label_map(scene)).save(root / "annotations" / split / f"{name}.png")
            counter.step()
    rows = [f"{number}\t{name}" for number, name in enumerate((*STUFF, *THINGS), start=1)]
    write_text(root / "objectInfo.txt", "\n".join(["Idx\tName", *rows]) + "\n")


def label_map(scene: Scene) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [H, W]: 0 void (seams, poles, things too hidden to tell), then the stuff classes, then the things."""
    labels = scene.stuff.copy()
    told = {id(thing) for thing in annotated(scene)}
    for thing in scene.things:
        labels[thing.mask] = 1 + len(STUFF) + thing.label if id(thing) in told else 0
    return labels


def _save_jpeg(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(path, "JPEG", quality=92)


WRITERS: dict[str, Callable[[Path, DemoSet, int, _Counter], None]] = {
    "imagenet": _write_imagenet,
    "coco": _write_coco,
    "ade20k": _write_ade20k,
}
