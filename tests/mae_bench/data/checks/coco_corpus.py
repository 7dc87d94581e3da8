"""A corpus of COCO data sets as people write them: honest variants, and malformed ones."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPLITS = ("train2017", "val2017")
WIDTH, HEIGHT = 48, 40
SIDE = 12  # pixels, of the square objects

Content = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A change of a sound data set, and what the check has to say about it.

    edit: changes the content of each annotation file.
    raw: changes the bytes of each annotation file.
    files: changes the folder.
    refused: what the error names, apart from the file; () if the variant is accepted.
    ceiling: AP_box and AP_mask of a perfect detector in percent.
    note: words of a note on an accepted variant.
    """

    name: str
    edit: Callable[[Content], object] = lambda content: None
    raw: Callable[[bytes], bytes] = lambda data: data
    files: Callable[[Path], object] = lambda root: None
    refused: tuple[str, ...] = ()
    ceiling: tuple[float, float] = (100.0, 100.0)
    note: str = ""


def write(root: Path, variant: Variant) -> Path:
    """Write a data set of two images with three objects each per split, changed by the variant."""
    (root / "annotations").mkdir(parents=True)
    for split, first in zip(SPLITS, (1, 11), strict=True):
        (root / split).mkdir()
        content = make_content(root / split, first)
        variant.edit(content)
        text = json.dumps(content, ensure_ascii=False).encode()
        (root / "annotations" / f"instances_{split}.json").write_bytes(variant.raw(text))
    variant.files(root)
    return root


def make_content(folder: Path, first: int) -> Content:
    """Write two images and return COCO's content for them: square objects of the categories 3 and 7."""
    images, annotations = [], []
    for number in (first, first + 1):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 80, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for place, category in enumerate((3, 7, 7)):
            x, y = 2 + 15 * place, 3 + 2 * place
            pixels[y : y + SIDE, x : x + SIDE] = (230, 40, 40) if category == 3 else (40, 40, 230)
            annotations.append(
                {
                    "id": 10 * number + place,
                    "image_id": number,
                    "category_id": category,
                    "iscrowd": 0,
                    "area": float(SIDE**2),
                    "bbox": [x, y, SIDE, SIDE],
                    "segmentation": [[x, y, x + SIDE, y, x + SIDE, y + SIDE, x, y + SIDE]],
                }
            )
        name = f"{number:012d}.png"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }


def first(part: str, **values: Any) -> Callable[[Content], object]:
    """Return an edit that sets values of the first entry of a part."""
    return lambda content: content[part][0].update(values)


def every(part: str, **values: Any) -> Callable[[Content], object]:
    """Return an edit that sets values of all entries of a part."""
    return lambda content: [entry.update(values) for entry in content[part]]


def lacks(part: str, key: str, which: slice = slice(None)) -> Callable[[Content], object]:
    """Return an edit that removes a key from entries of a part."""
    return lambda content: [entry.pop(key) for entry in content[part][which]]


def square_counts(annotation: dict[str, Any]) -> list[int]:
    """Return the run lengths of a square object, column by column."""
    x, y, width, height = annotation["bbox"]
    counts = [x * HEIGHT + y]
    for _ in range(width - 1):
        counts += [height, HEIGHT - height]
    return [*counts, height, HEIGHT * WIDTH - sum(counts) - height]


def compress(counts: list[int]) -> str:
    """Return COCO's compressed text of run lengths, as rleToString of cocoapi's maskApi.c."""
    text = ""
    for place, count in enumerate(counts):
        number = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            group, number = number & 31, number >> 5
            more = number != (-1 if group & 16 else 0)
            text += chr(group + 32 * more + 48)
    return text


def as_runs(encode: Callable[[list[int]], Any]) -> Callable[[Content], object]:
    """Return an edit that encodes all masks as run lengths."""

    def edit(content: Content) -> None:
        for item in content["annotations"]:
            item["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": encode(square_counts(item))}

    return edit


def with_runs(**values: Any) -> Callable[[Content], object]:
    """Return an edit that encodes the first mask as run lengths, with the given values."""

    def edit(content: Content) -> None:
        item = content["annotations"][0]
        item["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": square_counts(item)} | values

    return edit


def add_crowd(content: Content) -> None:
    """Add a crowd over the right half of the first image."""
    half = HEIGHT * WIDTH // 2
    content["annotations"].append(
        {
            "id": 999,
            "image_id": content["images"][0]["id"],
            "category_id": 3,
            "iscrowd": 1,
            "area": half,
            "bbox": [WIDTH // 2, 0, WIDTH // 2, HEIGHT],
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": [half, half]},
        }
    )


def add_many(content: Content) -> None:
    """Fill the second image with 150 objects of one pixel, all of category 3, in place of its objects."""
    number = content["images"][1]["id"]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != number]
    for place in range(150):
        x, y = 3 * (place % 15), 3 * (place // 15)
        content["annotations"].append(
            {
                "id": 1000 + place,
                "image_id": number,
                "category_id": 3,
                "iscrowd": 0,
                "area": 1,
                "bbox": [x, y, 1, 1],
                "segmentation": [[x, y, x + 1, y, x + 1, y + 1, x, y + 1]],
            }
        )


def move_last(dx: float, dy: float) -> Callable[[Content], object]:
    """Return an edit that moves the last object."""

    def edit(content: Content) -> None:
        item = content["annotations"][-1]
        x, y, width, height = item["bbox"]
        x, y = x + dx, y + dy
        item["bbox"] = [x, y, width, height]
        item["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]

    return edit


def rename_images(name: Callable[[str], str]) -> dict[str, Any]:
    """Return edits that rename every image in the annotations and in the folders."""

    def edit(content: Content) -> None:
        for image in content["images"]:
            image["file_name"] = name(image["file_name"])

    def files(root: Path) -> None:
        for split in SPLITS:
            for path in sorted((root / split).iterdir()):
                path.rename(path.with_name(name(path.name)))

    return {"edit": edit, "files": files}


def number(part: str, start: int) -> Callable[[Content], object]:
    """Return an edit that numbers the annotations or images from `start` on."""

    def edit(content: Content) -> None:
        new = {entry["id"]: start + place for place, entry in enumerate(content[part])}
        for entry in content[part]:
            entry["id"] = new[entry["id"]]
        if part == "images":
            for item in content["annotations"]:
                item["image_id"] = new[item["image_id"]]

    return edit


def number_categories(*ids: int) -> Callable[[Content], object]:
    """Return an edit that replaces the category ids 3 and 7."""

    def edit(content: Content) -> None:
        new = dict(zip((3, 7), ids, strict=True))
        for category in content["categories"]:
            category["id"] = new[category["id"]]
        for item in content["annotations"]:
            item["category_id"] = new[item["category_id"]]

    return edit


def turn_images(root: Path) -> None:
    """Store the images of val lying, with the EXIF orientation that sets them upright."""
    for path in (root / "val2017").iterdir():
        image = Image.open(path).transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[274] = 6
        image.save(path, exif=exif)


def deepen_images(root: Path) -> None:
    """Store the images of val in 16 bits, grey."""
    for path in (root / "val2017").iterdir():
        Image.fromarray(np.full((HEIGHT, WIDTH), 3000, np.uint16)).save(path)


def drop(part: str, which: slice) -> Callable[[Content], object]:
    """Return an edit that removes entries of a part."""
    return lambda content: content[part].__delitem__(which)


def both(*edits: Callable[[Content], object]) -> Callable[[Content], object]:
    """Return an edit that applies several in turn."""
    return lambda content: [edit(content) for edit in edits]


def mask_of_last(mask: Any) -> Callable[[Content], object]:
    """Return an edit that sets the mask of the last annotation."""
    return lambda content: content["annotations"][-1].update(segmentation=mask)


def replace(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Return a change of the first occurrence of some bytes in the file."""
    return lambda data: data.replace(old, new, 1)


# The category 3 has two objects per split. If the first is never found, its detection is false, and the
# precision is 1/2 up to a recall of 1/2: at 51 of 101 thresholds. The AP of the category 7 is 1.
ONE_IS_LOST = 100 * (51 / 101 / 2 + 1) / 2
# The category 7 has four. If the last is never found, the precision is 1 up to a recall of 3/4.
THE_LAST_IS_LOST = 100 * (76 / 101 + 1) / 2
# Of 151 objects of the category 3, 101 are counted: at 67 of 101 thresholds the recall is reached.
FIFTY_ARE_LOST = 100 * (67 / 101 + 1) / 2
AREA = HEIGHT * WIDTH
LINE = [[2, 3, 8, 3, 14, 3]]
BOW = [[2, 3, 14, 15, 14, 3, 2, 15]]
POLYGONS = "annotations[0].segmentation"
PART = [30, 30, 34, 30, 34, 34]

ACCEPTED = [
    Variant(
        "2 points after a polygon", first("annotations", segmentation=[BOW[0], [1, 2]]), note="fewer than 3"
    ),
    Variant(
        "2 points before a polygon", first("annotations", segmentation=[[1, 2, 9, 9], BOW[0]]), note="1 of 6"
    ),
    Variant("an empty polygon beside", first("annotations", segmentation=[[], BOW[0]]), note="1 of 6"),
    Variant("as it is"),
    Variant("annotation ids from 0", number("annotations", 0), note="annotation id 0 is replaced"),
    Variant("annotation ids from 1", number("annotations", 1)),
    Variant("negative annotation ids", number("annotations", -3), note="annotation id 0 is replaced"),
    Variant("image ids from 0", number("images", 0)),
    Variant("large ids", both(number("images", 2**62), number("annotations", 2**62))),
    Variant("category ids from 0", number_categories(0, 1)),
    Variant("category ids in reverse order", number_categories(90, 2)),
    Variant("an unused category", lambda content: content["categories"].append({"id": 9, "name": "none"})),
    Variant("categories of one name", every("categories", name="thing")),
    Variant("one category", both(drop("categories", slice(1, 2)), every("annotations", category_id=3))),
    Variant("categories in other scripts", first("categories", name="кошка 猫 🐈")),
    Variant("image names in other scripts", **rename_images(lambda name: f"фото ü {name}")),
    Variant("other keys", every("annotations", score=None, attributes={"occluded": True})),
    Variant("no info and no licences", lambda content: [content.pop(key) for key in ("info", "licenses")]),
    Variant("keypoints", every("annotations", keypoints=[4, 5, 2], num_keypoints=1)),
    Variant("ignore is 0", every("annotations", ignore=0)),
    Variant("no iscrowd", lacks("annotations", "iscrowd"), note="iscrowd is missing in 6 of 6"),
    Variant("iscrowd is false", every("annotations", iscrowd=False)),
    Variant("no area", lacks("annotations", "area"), note="area is missing in 6 of 6"),
    Variant("some without area", lacks("annotations", "area", slice(2)), note="area is missing in 2 of 6"),
    Variant("no iscrowd, id 0", both(lacks("annotations", "iscrowd"), number("annotations", 0)), note="id 0"),
    Variant("an area of 0", every("annotations", area=0)),
    Variant("a byte-order mark", raw=lambda data: b"\xef\xbb\xbf" + data, note="byte-order mark"),
    Variant("spaces around", raw=lambda data: b"\n " + data + b"\n\n"),
    Variant("an image without objects", drop("annotations", slice(3, 6))),
    Variant("files that are not listed", files=lambda root: (root / "val2017" / "more.jpg").touch()),
    Variant("a crowd", add_crowd),
    Variant("iscrowd at the crowd alone", both(lacks("annotations", "iscrowd"), add_crowd), note="in 6 of 7"),
    Variant(
        "an image with only a crowd", both(drop("annotations", slice(1, 3)), first("annotations", iscrowd=1))
    ),
    Variant("run lengths", as_runs(list)),
    Variant("compressed run lengths", as_runs(compress)),
    Variant("run lengths and polygons", with_runs()),
    Variant("runs of length 0", with_runs(counts=[0, 5, 0, 7, AREA - 12])),
    Variant("two runs of length 0", with_runs(counts=[5, 4, 0, 0, 9, AREA - 18])),
    Variant("an object of two parts", lambda content: content["annotations"][0]["segmentation"].append(PART)),
    Variant("a polygon that crosses itself", first("annotations", segmentation=BOW)),
    Variant("a polygon without area", first("annotations", segmentation=LINE), ceiling=(100.0, ONE_IS_LOST)),
    Variant("an empty mask", with_runs(counts=[AREA]), ceiling=(100.0, ONE_IS_LOST)),
    Variant("a mask of all pixels", with_runs(counts=[0, AREA])),
    Variant("a sub-pixel box", first("annotations", bbox=[2.25, 3.5, 0.5, 0.25])),
    Variant("a box below float32", first("annotations", bbox=[40, 3, 1e-9, 9]), ceiling=(ONE_IS_LOST, 100.0)),
    Variant("a box without height", first("annotations", bbox=[2, 3, 12, 0]), ceiling=(ONE_IS_LOST, 100.0)),
    Variant("an object that sticks out", move_last(10, 3), note="1 of 6 boxes"),
    Variant("an object outside", move_last(30, 3), ceiling=(100.0, THE_LAST_IS_LOST), note="1 of 6 boxes"),
    Variant("one object twice", lambda c: c["annotations"].append(c["annotations"][0] | {"id": 7})),
    Variant("150 objects in an image", add_many, ceiling=(FIFTY_ARE_LOST, FIFTY_ARE_LOST)),
    Variant("lying images with an EXIF orientation", files=turn_images),
]

REFUSED = [
    Variant("cut short", raw=lambda data: data[:-40], refused=("not a JSON file", "download")),
    Variant("bytes at the end", raw=lambda data: data + b"}", refused=("not a JSON file",)),
    Variant("two documents", raw=lambda data: data + b"\n" + data, refused=("not a JSON file",)),
    Variant("an empty file", raw=lambda data: b"", refused=("not a JSON file",)),
    Variant("UTF-16", raw=lambda data: data.decode().encode("utf-16"), refused=("not a JSON file", "UTF-8")),
    Variant("Latin-1", raw=replace(b'"cat"', b'"ch\xe2t"'), refused=("not a JSON file", "UTF-8")),
    Variant("a list", raw=lambda data: b"[" + data + b"]", refused=("has no images",)),
    Variant("detections", raw=lambda data: b'[{"image_id": 1, "score": 0.5}]', refused=("has no images",)),
    Variant("no categories", lambda content: content.pop("categories"), refused=("has no categories",)),
    Variant("no annotations", drop("annotations", slice(None)), refused=("has no annotations",)),
    Variant("null annotations", lambda c: c.update(annotations=None), refused=("has no annotations",)),
    Variant("images by id", lambda c: c.update(images={"1": c["images"][0]}), refused=("has no images",)),
    Variant("an entry that is null", lambda c: c["images"].append(None), refused=("images[2] is no object",)),
    Variant("an id as a text", first("images", id="1"), refused=("images[0].id", "an integer")),
    Variant(
        "an id with a fraction", first("annotations", id=1.0), refused=("annotations[0].id", "an integer")
    ),
    Variant("an id that is true", first("annotations", image_id=True), refused=("annotations[0].image_id",)),
    Variant("an id of 20 digits", first("annotations", id=10**20), refused=("annotations[0].id", "64 bits")),
    Variant("no annotation ids", lacks("annotations", "id"), refused=("[0].id is missing", "5 more entries")),
    Variant("an annotation id twice", every("annotations", id=5), refused=("ids in 'annotations'", "5")),
    Variant("an image id twice", every("images", id=5), refused=("ids in 'images'", "5")),
    Variant("a category id twice", every("categories", id=3), refused=("ids in 'categories'", "3")),
    Variant(
        "a file name twice", every("images", file_name="000000000001.png"), refused=("file names", "1.png")
    ),
    Variant("a file name that is null", first("images", file_name=None), refused=("images[0].file_name",)),
    Variant("a file name that is a number", first("images", file_name=1), refused=("images[0].file_name",)),
    Variant("a missing image", first("images", file_name="gone.png"), refused=("missing", "gone.png")),
    Variant(
        "an image in a subfolder", first("images", file_name="a/1.png"), refused=("a/1.png", "subfolders")
    ),
    Variant("an unknown image", first("annotations", image_id=77), refused=("unknown images", "77")),
    Variant(
        "an unknown category", first("annotations", category_id=77), refused=("unknown categories", "77")
    ),
    Variant("a category without a name", first("categories", name=None), refused=("categories[0].name",)),
    Variant("a width of 0", first("images", width=0), refused=("images[0].width", "pixels")),
    Variant("a width as a text", first("images", width="48"), refused=("images[0].width", "pixels")),
    Variant("no height", lacks("images", "height"), refused=("images[0].height is missing",)),
    Variant("width for height", every("images", width=40, height=48), refused=("2 of 2 images", "48 x 40")),
    Variant("another width", first("images", width=49), refused=("1 of 2 images", "49 x 40", "48 x 40")),
    Variant("16-bit images", files=deepen_images, refused=("2 of 2 images", "8 bits")),
    Variant("a box of three numbers", first("annotations", bbox=[1, 2, 3]), refused=("annotations[0].bbox",)),
    Variant(
        "a box of five numbers", first("annotations", bbox=[1, 2, 3, 4, 5]), refused=("[0].bbox", "four")
    ),
    Variant("an empty box", first("annotations", bbox=[]), refused=("annotations[0].bbox", "four finite")),
    Variant("no boxes", lacks("annotations", "bbox"), refused=("annotations[0].bbox is missing",)),
    Variant("a boolean box", first("annotations", bbox=[1, 2, True, True]), refused=("[0].bbox", "True")),
    Variant("a box of texts", first("annotations", bbox=["1", "2", "3", "4"]), refused=("[0].bbox", "'1'")),
    Variant(
        "an infinite box", first("annotations", bbox=[0, 0, math.inf, 3]), refused=("[0].bbox", "finite")
    ),
    Variant("a box of NaN", first("annotations", bbox=[math.nan, 0, 1, 3]), refused=("[0].bbox", "finite")),
    Variant("a box of null", first("annotations", bbox=[None, 0, 1, 3]), refused=("[0].bbox", "finite")),
    Variant(
        "a box of negative width", first("annotations", bbox=[9, 9, -5, 5]), refused=("negative", "id 10")
    ),
    Variant("a box of 10 images", first("annotations", bbox=[0, 0, 480, 400]), refused=("outside", "id 10")),
    Variant("an area as a text", first("annotations", area="144"), refused=("annotations[0].area",)),
    Variant("an area of NaN", first("annotations", area=math.nan), refused=("annotations[0].area",)),
    Variant("a negative area", first("annotations", area=-1), refused=("annotations[0].area",)),
    Variant("an area that is true", first("annotations", area=True), refused=("annotations[0].area",)),
    Variant("an area above 1e10", first("annotations", area=2e10), refused=("annotations[0].area",)),
    Variant("iscrowd as a text", first("annotations", iscrowd="0"), refused=("[0].iscrowd", "0 or 1")),
    Variant("iscrowd is 2", first("annotations", iscrowd=2), refused=("annotations[0].iscrowd", "0 or 1")),
    Variant("iscrowd is null", first("annotations", iscrowd=None), refused=("annotations[0].iscrowd",)),
    Variant("nothing but crowds", every("annotations", iscrowd=1), refused=("crowds", "iscrowd")),
    Variant("an ignored object", first("annotations", ignore=1), refused=("[0].ignore", "iscrowd 1")),
    Variant("keypoints as a text", first("annotations", keypoints="1 2 2"), refused=("[0].keypoints",)),
    Variant("boxes only", lacks("annotations", "segmentation"), refused=("6 of 6", "no mask", "Mask R-CNN")),
    Variant("a mask that is null", first("annotations", segmentation=None), refused=("1 of 6", "no mask")),
    Variant(
        "a mask of nothing", first("annotations", segmentation=[]), refused=("1 of 6", "no mask", "id 10")
    ),
    Variant("a crowd without a mask", both(add_crowd, mask_of_last([])), refused=("1 of 7", "id 999")),
    Variant("an empty polygon", first("annotations", segmentation=[[]]), refused=("1 of 6", "3 points")),
    Variant(
        "a polygon of 2 points",
        first("annotations", segmentation=[[1, 2, 9, 9]]),
        refused=("1 of 6", "3 points"),
    ),
    Variant("a polygon that is no list", first("annotations", segmentation=BOW[0]), refused=(POLYGONS,)),
    Variant(
        "an odd polygon", first("annotations", segmentation=[[1, 2, 9, 2, 9, 9, 1]]), refused=("odd", "id 10")
    ),
    Variant(
        "a NaN polygon", first("annotations", segmentation=[[1, 2, 9, 2, 9, math.nan]]), refused=("finite",)
    ),
    Variant(
        "an infinite polygon",
        first("annotations", segmentation=[[1, 2, 9, math.inf, 9, 9]]),
        refused=(POLYGONS,),
    ),
    Variant(
        "a boolean polygon", first("annotations", segmentation=[[1, 2, 9, 2, 9, True]]), refused=(POLYGONS,)
    ),
    Variant(
        "a polygon of texts",
        first("annotations", segmentation=[["1", "2", "9", "2", "9", "9"]]),
        refused=(POLYGONS,),
    ),
    Variant(
        "a polygon of pairs",
        first("annotations", segmentation=[[[1, 2], [9, 2], [9, 9]]]),
        refused=(POLYGONS,),
    ),
    Variant(
        "a polygon at 1e300",
        first("annotations", segmentation=[[1, 2, 1e300, 2, 9, 9]]),
        refused=("outside",),
    ),
    Variant("a mask as a text", first("annotations", segmentation="1 2 9 2 9 9"), refused=(POLYGONS,)),
    Variant("run lengths of another size", with_runs(size=[HEIGHT, WIDTH + 1]), refused=("another size",)),
    Variant("run lengths of width x height", with_runs(size=[WIDTH, HEIGHT]), refused=("another size",)),
    Variant("run lengths without a size", with_runs(size=None), refused=(POLYGONS, "height, width")),
    Variant("run lengths without counts", with_runs(counts=None), refused=(POLYGONS, "counts")),
    Variant("negative run lengths", with_runs(counts=[-5, AREA + 5]), refused=(POLYGONS,)),
    Variant("run lengths with a fraction", with_runs(counts=[0.5, AREA - 0.5]), refused=(POLYGONS,)),
    Variant(
        "run lengths of fewer pixels", with_runs(counts=[5, 7]), refused=("run lengths", "height x width")
    ),
    Variant("no run lengths", with_runs(counts=[]), refused=("run lengths", "id 10")),
    Variant("an empty text", with_runs(counts=""), refused=("run lengths", "id 10")),
    Variant(
        "a text that is cut short", with_runs(counts=compress([5, 7, AREA - 12])[:-1]), refused=("id 10",)
    ),
    Variant("a text in base64", with_runs(counts="aGVsbG8gd29ybGQ="), refused=("run lengths", "mask.encode")),
    Variant("a text in other characters", with_runs(counts="äöü"), refused=("run lengths", "mask.encode")),
    Variant("a text of fewer pixels", with_runs(counts=compress([5, 7])), refused=("run lengths",)),
    Variant(
        "a text of negative lengths", with_runs(counts=compress([5, -7, AREA + 2])), refused=("run lengths",)
    ),
]
