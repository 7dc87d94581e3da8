"""Prepare COCO's annotation files for detectron2 and pycocotools: as they are, or as a repaired copy."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.mask import area

from mae_bench.data.checks.annotations import Annotations, read_annotations, select_polygons
from mae_bench.data.checks.coco import annotation_path, check_split
from mae_bench.files import write_text


def prepare_annotations(root: Path, split: str, folder: Path) -> Path:
    """Return the path of a split's annotations: of the file itself, or of its repaired copy in `folder`."""
    path = annotation_path(root, split)
    if not check_split(root, split).repairs:
        return path
    data, _ = read_annotations(path)
    repair(data)
    write_text(folder / path.name, json.dumps(data))
    return folder / path.name


def repair(data: Annotations) -> None:
    """Replace the annotation id 0, leave out short polygons, and fill in missing `iscrowd` and `area`.

    pycocotools stores the id of the object that a detection matches, and 0 for none: an object with the id 0
    is never found.
    """
    masks = COCO()
    masks.dataset = data
    with redirect_stdout(io.StringIO()):
        masks.createIndex()
    unused = max(annotation["id"] for annotation in data["annotations"]) + 1
    for annotation in data["annotations"]:
        annotation["id"] = annotation["id"] or unused
        annotation.setdefault("iscrowd", 0)
        mask = annotation.get("segmentation")
        if isinstance(mask, list):
            annotation["segmentation"] = select_polygons(mask)
        if "area" not in annotation:
            annotation["area"] = float(area(masks.annToRLE(annotation)))
