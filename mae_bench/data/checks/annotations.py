"""Read COCO's annotation files with checked types; refuse what detectron2 or pycocotools would misread."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from annotated_types import Len
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic requires it before Python 3.12

from mae_bench.data.checks.folders import EXPECTED, describe_folder, join_names
from mae_bench.data.checks.run_lengths import decode_counts
from mae_bench.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # pycocotools sorts them as numpy's int64
Side = Annotated[int, Field(gt=0, lt=2**16)]  # pixels; the run lengths of a mask have 32 bits
Box = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
Polygon = list[FiniteFloat]  # x, y, x, y, ...

SHORTEST_POLYGON = 6  # numbers, of 3 points


class RunLengths(TypedDict):
    """A mask as lengths of runs, column by column; a text is compressed."""

    size: tuple[Side, Side]
    counts: str | list[Annotated[int, Field(ge=0, lt=2**32)]]


class Image(TypedDict):
    """An image of the split; its file is in the split's folder."""

    id: Id
    file_name: Annotated[str, Field(min_length=1)]
    width: Side
    height: Side


class Category(TypedDict):
    """A class of objects."""

    id: Id
    name: str


class Annotation(TypedDict):
    """An object, or a crowd: a region of many objects, which is neither trained on nor scored."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: Box
    area: NotRequired[Annotated[FiniteFloat, Field(ge=0, le=1e10)]]  # pycocotools ignores larger objects
    iscrowd: NotRequired[Literal[0, 1]]
    segmentation: NotRequired[list[Polygon] | RunLengths | None]
    ignore: NotRequired[Literal[0]]  # detectron2 reads no other value
    keypoints: NotRequired[list[float] | None]


class Annotations(TypedDict):
    """The content of an annotation file that training and scoring read; other keys are left out."""

    images: Annotated[list[Image], Len(1)]
    categories: Annotated[list[Category], Len(1)]
    annotations: Annotated[list[Annotation], Len(1)]


FILE = TypeAdapter(Annotations)
WANTED = {  # the values of keys, for errors
    "id": "an integer of 64 bits that no other entry has",
    "image_id": "the id of an image",
    "category_id": "the id of a category",
    "file_name": "the name of a file in the split's folder",
    "width": "the width of the image in pixels, an integer from 1 to 65535",
    "height": "the height of the image in pixels, an integer from 1 to 65535",
    "name": "a text",
    "bbox": "four finite numbers in pixels, [x, y, width, height]",
    "area": "the number of pixels of the object, from 0 to 1e10, or no such key",
    "iscrowd": "0 or 1, or no such key",
    "segmentation": "polygons of finite numbers, [[x, y, x, y, x, y, ...], ...], "
    'or run lengths, {"size": [height, width], "counts": ...}',
    "ignore": "0 or no such key; regions that are not to be scored have iscrowd 1",
    "keypoints": "a list of numbers, or no such key",
}


class Fault(NamedTuple):
    """What is wrong with annotations, and what to do about it."""

    given: str
    expected: str
    fix: str


NO_MASK = Fault(
    "have no mask: `segmentation` is missing, null or empty",
    "a mask for each object and crowd: Mask R-CNN is trained on masks and scored by them",
    "add the masks, or leave these annotations out",
)
NO_POLYGON = Fault(
    "have no polygon of at least 3 points",
    "[[x, y, x, y, x, y, ...], ...]; shorter polygons are left out",
    "correct the polygons, or leave these annotations out",
)
NEGATIVE_BOX = Fault(
    "have a bbox of negative width or height",
    "x, y, width, height in pixels, with x and y of the upper left corner",
    "convert the boxes, which may be x0, y0, x1, y1 with swapped corners, or leave these annotations out",
)
FAR_AWAY = Fault(
    "have a bbox or polygon more than the image's own size outside of it",
    "coordinates in pixels of the image",
    "check their image_id and whether they are in pixels of another size, or leave these annotations out",
)
ODD_POLYGON = Fault(
    "have a polygon with an odd number of coordinates",
    "[x, y, x, y, x, y, ...]",
    "correct the polygons, or leave these annotations out",
)
WRONG_SIZE = Fault(
    "have a mask of another size than their image",
    "a size of [height, width], as of the image",
    "encode these masks at the size of their images",
)
WRONG_COUNTS = Fault(
    "have run lengths that are not those of a mask of its size",
    "counts that add up to height x width: integers, or a text that pycocotools' mask.encode returns",
    "encode these masks again with pycocotools, or leave these annotations out",
)


def read_annotations(path: Path) -> tuple[Annotations, bool]:
    """Return the content of an annotation file, and whether it begins with a byte-order mark.

    Raise UserError for a file that is missing, not JSON or not of these types, and for entries that
    contradict one another; image files are not looked at.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; found in {path.parent}: {describe_folder(path.parent)}",
            expected=EXPECTED["coco"],
        ) from None
    has_mark = raw.startswith(BYTE_ORDER_MARK)
    try:
        data = FILE.validate_json(raw[len(BYTE_ORDER_MARK) :] if has_mark else raw, strict=True)
    except ValidationError as error:
        raise _describe(path, error) from error
    _check_entries(path, data)
    _check_geometry(path, data)
    return data, has_mark


def _describe(path: Path, error: ValidationError) -> UserError:
    """Return the first error of a file as a UserError."""
    errors = error.errors(include_url=False)
    # A segmentation is compared with both of its types: the error inside the matching one tells more.
    inside = [e for e in errors if len(e["loc"]) != 4 or e["type"] not in ("list_type", "dict_type")]
    first = (inside or errors)[0]
    message, place = first["msg"], first["loc"]
    if first["type"] == "json_invalid":
        return UserError(
            f"{path} is not a JSON file: {message}",
            expected="COCO's instances file in UTF-8",
            fix="download or unpack it again: it may be truncated",
        )
    if len(place) < 2:
        part = str(place[0]) if place else "images"
        return UserError(
            f"{path} has no {part}",
            expected=f"an object with a non-empty list {part!r}",
            fix="give an instances file of COCO's format; image lists and results have other keys",
        )
    entry = f"{place[0]}[{place[1]}]"
    num_others = len({e["loc"][:2] for e in errors}) - 1
    others = f"; {num_others} more entries have an error" if num_others else ""
    if len(place) == 2:
        return UserError(
            f"{path}: {entry} is no object{others}", expected="an object", fix="correct the file"
        )
    key = str(place[2])
    found = (
        "is missing"
        if first["type"] == "missing" and len(place) == 3
        else f"is wrong: {message}, found {first['input']!r:.80}"
    )
    return UserError(
        f"{path}: {entry}.{key} {found}{others}",
        expected=f"{key}: {WANTED[key]}",
        fix="correct the file, or leave such entries out",
    )


def _check_entries(path: Path, data: Annotations) -> None:
    """Raise UserError for ids or names that occur twice, for unknown ids, and for a file without objects."""
    images, categories, annotations = data["images"], data["categories"], data["annotations"]
    image_ids, category_ids = [image["id"] for image in images], [category["id"] for category in categories]
    _require_unique(path, "ids in 'images'", image_ids)
    _require_unique(path, "ids in 'categories'", category_ids)
    _require_unique(path, "ids in 'annotations'", (annotation["id"] for annotation in annotations))
    _require_unique(path, "file names in 'images'", (image["file_name"] for image in images))
    used_images = {annotation["image_id"] for annotation in annotations}
    used_categories = {annotation["category_id"] for annotation in annotations}
    for part, unknown in (
        ("images", used_images - set(image_ids)),
        ("categories", used_categories - set(category_ids)),
    ):
        if unknown:
            raise UserError(
                f"{path}: annotations refer to unknown {part}: id {join_names(unknown)}",
                expected=f"the id of an entry of {part!r}",
                fix=f"add these {part}, or leave their annotations out",
            )
    if all(annotation.get("iscrowd") for annotation in annotations):
        raise UserError(
            f"{path}: all of its {len(annotations)} annotations are crowds",
            expected="objects with iscrowd 0: crowds are neither trained on nor scored",
            fix="set iscrowd to 0 where an annotation is a single object",
        )


def _require_unique(path: Path, what: str, values: Iterable[Any]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path}: {what} that occur more than once: {join_names(repeated)}",
            expected="each of them once",
            fix="number the entries anew, or leave the copies out",
        )


def _check_geometry(path: Path, data: Annotations) -> None:
    """Raise UserError, with the ids, for boxes and masks that are not of their image."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    found: dict[Fault, list[int]] = {}
    for annotation in data["annotations"]:
        fault = _find_fault(annotation, *sizes[annotation["image_id"]])
        if fault:
            found.setdefault(fault, []).append(annotation["id"])
    for fault, ids in found.items():
        share = f"{len(ids)} of {len(data['annotations'])} annotations"
        raise UserError(
            f"{path}: {share} {fault.given}: id {join_names(ids)}",
            expected=fault.expected,
            fix=fault.fix,
        )


def _find_fault(annotation: Annotation, width: int, height: int) -> Fault | None:
    mask = annotation.get("segmentation")
    x, y, w, h = annotation["bbox"]
    if not mask:
        return NO_MASK
    if w < 0 or h < 0:
        return NEGATIVE_BOX
    if not (_is_near((x, x + w), width) and _is_near((y, y + h), height)):
        return FAR_AWAY
    if isinstance(mask, dict):
        return _find_fault_of_runs(mask, width, height)
    polygons = select_polygons(mask)
    if not polygons:
        return NO_POLYGON
    for polygon in polygons:
        if len(polygon) % 2:
            return ODD_POLYGON
        # Beyond 32 bits pycocotools' integers overflow.
        if not (_is_near(polygon[::2], width) and _is_near(polygon[1::2], height)):
            return FAR_AWAY
    return None


def select_polygons(mask: list[Polygon]) -> list[Polygon]:
    """Return the polygons of at least 3 points. detectron2 trains on no others, and pycocotools may fail."""
    return [polygon for polygon in mask if len(polygon) >= SHORTEST_POLYGON]


def has_short_polygon(annotation: Annotation) -> bool:
    """Return whether a polygon of the annotation has fewer than 3 points."""
    mask = annotation.get("segmentation")
    return isinstance(mask, list) and len(select_polygons(mask)) < len(mask)


def _is_near(values: Iterable[float], side: int) -> bool:
    values = list(values)
    return min(values) >= -side and max(values) <= 2 * side


def _find_fault_of_runs(mask: RunLengths, width: int, height: int) -> Fault | None:
    if mask["size"] != (height, width):
        return WRONG_SIZE
    counts = mask["counts"]
    if isinstance(counts, list):
        return None if sum(counts) == width * height else WRONG_COUNTS
    try:
        runs = decode_counts(counts)
    except ValueError:
        return WRONG_COUNTS
    return None if runs.min() >= 0 and runs.sum() == width * height else WRONG_COUNTS
