"""ImageNet's folders from the original archives of ILSVRC2012, checked, resumable, and whole or not there."""

import csv
import hashlib
import io
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_bench.data.sets.index import IndexedImages, build_index, classify_by_folder, sort_key
from mae_bench.data.sets.packed import PackOptions, ProgressCallback, pack_sources
from mae_bench.data.sets.source import ImageSource, is_image
from mae_bench.data.sets.tars import check_end
from mae_bench.errors import NotInstalled, UserError
from mae_bench.files import is_full, write_json, write_text

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {  # as torchvision's datasets/imagenet.py and the download page of image-net.org have them
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
COUNTS = {"train": 1_281_167, "val": 50_000, "classes": 1000}
NAME = "ImageNet-1K"
WNID = re.compile(r"n\d{8}")
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"

Places = dict[str, tuple[int, int]]  # name -> first byte in the archive, and size


@dataclass(frozen=True)
class Prepared:
    """Images a split and classes of what was made."""

    root: Path
    train: int
    val: int
    classes: int


def prepare_imagenet(
    source: Path,
    out: Path,
    progress: ProgressCallback | None = None,
    *,
    check: bool = True,
    val_classes: Path | None = None,
    packed: PackOptions | None = None,
    num_workers: int = 0,
) -> Prepared:
    """Makes out/train/WNID/*.JPEG and out/val/WNID/*.JPEG from the archives in `source`; a stopped call goes on.

    The classes' order is that of their WordNet ids, so that the labels are everybody's. check: compare the archives' MD5, and
    the number of images with ILSVRC2012's. val_classes: a text with an image's name and its WNID a line (or Kaggle's
    LOC_val_solution.csv), in the place of the devkit. packed: make a packed set in that way instead, straight from the
    archives, with `num_workers` processes. UserError: an archive is missing, is not the published one or is
    damaged; the disk is full.
    """
    needed = [TRAIN, VAL] if val_classes else [TRAIN, VAL, DEVKIT]
    if lacking := [name for name in needed if not (source / name).is_file()]:
        raise UserError(
            f"{source} lacks {', '.join(lacking)}", expected=f"{', '.join(needed)}, as image-net.org publishes them",
            fix="without the devkit, give a file with the classes of the validation images" * (lacking == [DEVKIT]),
        )  # fmt: skip
    with _readable(out):
        if check:
            _check_md5([source / name for name in needed], out.with_name(f".{out.name}.checked"), progress)
        labels = _listed(val_classes) if val_classes else _devkit(source / DEVKIT)
        name = NAME if check else out.resolve().name
        if packed:
            sources = _sources(source, labels)
            made = Prepared(out, len(sources["train"]), len(sources["val"]), len(sources["train"].classes))
            _check_counts(made, check)
            pack_sources(sources, out, packed, name=name, num_workers=num_workers, progress=progress)
            return made
        _make_train(source / TRAIN, out / "train", progress)
        _make_val(source / VAL, out / "val", labels, progress)
        made = _count(out)
        _check_counts(made, check)
        write_json(out / "dataset.json", {"name": name})
    return made


def _check_counts(made: Prepared, check: bool) -> None:
    found = {"train": made.train, "val": made.val, "classes": made.classes}
    if check and found != COUNTS:
        raise UserError(
            f"{made.root} holds {found}", expected=str(COUNTS), fix=f"remove {made.root} and prepare it again"
        )


def _sources(source: Path, labels: list[str] | dict[str, str]) -> dict[str, ImageSource]:
    """The images where they lie in the archives: a tar inside a tar is read at the sum of both places."""
    train: Places = {}
    with tarfile.open(source / TRAIN, "r:") as outer:
        for member in _classes_of(outer, source / TRAIN):
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                images = [
                    (Path(image.name).name, image)
                    for image in inner
                    if _is_plain_image(image, source / TRAIN)
                ]
                check_end(inner)
            wnid = Path(member.name).stem
            train |= {
                f"{wnid}/{name}": (member.offset_data + image.offset_data, image.size)
                for name, image in images
            }
    with tarfile.open(source / VAL, "r:") as file:
        val: Places = {
            f"{wnid}/{Path(member.name).name}": (member.offset_data, member.size)
            for member, wnid in _labelled(file, labels, source / VAL)
            if _is_plain_image(member, source / VAL)
        }
    return {"train": _in_archive(train, source / TRAIN), "val": _in_archive(val, source / VAL)}


def _in_archive(places: Places, archive: Path) -> ImageSource:
    names = sorted(places, key=sort_key)
    targets, classes = classify_by_folder(names)
    starts, sizes = [places[name][0] for name in names], [places[name][1] for name in names]
    index = build_index(
        names, sizes, targets, classes, files=[str(archive.absolute())], shard=[0] * len(names), starts=starts
    )
    return IndexedImages(index, "/")


@contextmanager
def _readable(out: Path) -> Iterator[None]:
    """Turns what the system says into what the user can do."""
    try:
        yield
    except tarfile.TarError as error:
        raise UserError(f"an archive is damaged: {error}", fix="fetch it again") from error
    except OSError as error:
        full = is_full(error)
        raise UserError(
            f"{out} cannot be made: {error}",
            expected="about 155 GB of room" * full,
            fix="make room; the same command goes on",
        ) from error


def _check_md5(archives: list[Path], record: Path, progress: ProgressCallback | None) -> None:
    known = set(record.read_text(encoding="utf-8").splitlines()) if record.is_file() else set()
    for path in archives:
        mark = f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
        if mark in known:
            continue
        if (found := _md5(path, progress)) != MD5[path.name]:
            raise UserError(
                f"{path} has MD5 {found}", expected=f"{MD5[path.name]}, the published archive",
                fix="fetch it again; or switch the check off, if it is meant to be another",
            )  # fmt: skip
        known.add(mark)
        write_text(record, "".join(f"{line}\n" for line in sorted(known)))


def _md5(path: Path, progress: ProgressCallback | None) -> str:
    digest, size = hashlib.md5(usedforsecurity=False), path.stat().st_size
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            if progress:
                progress(f"checking {path.name}", file.tell(), size)
    return digest.hexdigest()


def _devkit(path: Path) -> list[str]:
    """The WNID of each validation image, in order: meta.mat numbers the classes, the ground truth gives each image's number."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise NotInstalled(
            f"the devkit's meta.mat needs scipy: {error}",
            fix="python -m pip install scipy, or give a file with the classes of the validation images",
        ) from error
    with tarfile.open(path, "r:gz") as file:
        contents = {name: _member(file, name, path) for name in (META, TRUTH)}
    synsets = loadmat(io.BytesIO(contents[META]), squeeze_me=True)["synsets"]
    wnids = {
        int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0
    }  # the rest are the leaves' parents in the hierarchy
    return [wnids[int(number)] for number in contents[TRUTH].split()]


def _member(file: tarfile.TarFile, ending: str, path: Path) -> bytes:
    member = next((member for member in file if member.isreg() and member.name.endswith(ending)), None)
    content = file.extractfile(member) if member else None
    if content is None:
        raise UserError(f"{path} lacks {ending}", expected="the devkit of ILSVRC2012")
    return content.read()


def _listed(path: Path) -> dict[str, str]:
    """Name of a validation image (without its ending) -> WNID, from a text or a CSV with both in each line."""
    found: dict[str, str] = {}
    for row in csv.reader(
        re.sub(r"[ \t]+", ",", line) for line in path.read_text(encoding="utf-8").splitlines()
    ):
        wnid = next((cell for cell in row if WNID.fullmatch(cell)), None)
        if row and wnid and row[0] != wnid:
            found[Path(row[0]).stem] = wnid
    if not found:
        raise UserError(
            f"{path} names no classes", expected="ILSVRC2012_val_00000001.JPEG n01751748, an image a line"
        )
    return found


def _make_train(archive: Path, folder: Path, progress: ProgressCallback | None) -> None:
    """A tar of tars, a class each; a class's folder appears when it is whole."""
    with tarfile.open(archive, "r:") as outer:
        members = _classes_of(outer, archive)
        for done, member in enumerate(members, 1):
            wnid = Path(member.name).stem
            if not (folder / wnid).is_dir():
                part = folder / f".{wnid}.part"
                shutil.rmtree(part, ignore_errors=True)
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    for image in inner:
                        _extract(inner, image, part, archive)
                    check_end(inner)
                part.rename(folder / wnid)
            if progress:
                progress("train", done, len(members))


def _classes_of(outer: tarfile.TarFile, archive: Path) -> list[tarfile.TarInfo]:
    members = [member for member in outer if member.isreg()]
    check_end(outer)
    if strange := next(
        (member.name for member in members if not WNID.fullmatch(Path(member.name).stem)), None
    ):
        raise UserError(f"{archive} has a member {strange}", expected="a tar a class, such as n01440764.tar")
    return members


def _labelled(
    file: tarfile.TarFile, labels: list[str] | dict[str, str], archive: Path
) -> list[tuple[tarfile.TarInfo, str]]:
    """The validation images in the order of their names, with their WNIDs."""
    members = sorted((member for member in file if member.isreg()), key=lambda member: Path(member.name).name)
    check_end(file)
    stems = [Path(member.name).stem for member in members]
    if isinstance(labels, list):
        if len(labels) != len(members):
            raise UserError(
                f"{archive} has {len(members)} images", expected=f"{len(labels)}, as the devkit has labels"
            )
        labels = dict(zip(stems, labels, strict=True))
    if unknown := next((stem for stem in stems if stem not in labels), None):
        raise UserError(f"no class is given for {unknown}", expected="one for every validation image")
    return [(member, labels[stem]) for member, stem in zip(members, stems, strict=True)]


def _make_val(
    archive: Path, folder: Path, labels: list[str] | dict[str, str], progress: ProgressCallback | None
) -> None:
    """One flat tar, whose images go to the folders of their classes; `val` appears when it is whole."""
    if folder.is_dir():
        return
    part = folder.with_name(f".{folder.name}.part")
    with tarfile.open(archive, "r:") as file:
        members = _labelled(file, labels, archive)
        for done, (member, wnid) in enumerate(members, 1):
            _extract(file, member, part / wnid, archive)
            if progress and (done % 1000 == 0 or done == len(members)):
                progress("val", done, len(members))
    part.rename(folder)


def _is_plain_image(member: tarfile.TarInfo, archive: Path) -> bool:
    """True; UserError for whatever is no image's name, is a link or leads elsewhere."""
    name = Path(member.name).name
    if member.isreg() and member.name.removeprefix("./") == name and is_image(name):
        return True
    raise UserError(
        f"{archive} has a member {member.name!r}", expected="images alone, without folders or links"
    )


def _extract(file: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, archive: Path) -> None:
    """Writes one image under its bare name."""
    _is_plain_image(member, archive)
    path, content = folder / Path(member.name).name, file.extractfile(member)
    if path.is_file() and path.stat().st_size == member.size:  # an earlier call got so far
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        copied: Any = content
        shutil.copyfileobj(copied, out, 1 << 20)
    if path.stat().st_size != member.size:
        raise tarfile.ReadError(f"{archive} ends in the middle of {member.name}")


def _count(out: Path) -> Prepared:
    counts = {
        split: {
            folder.name: sum(1 for _ in folder.iterdir())
            for folder in (out / split).iterdir()
            if WNID.fullmatch(folder.name)
        }
        for split in ("train", "val")
    }
    if difference := set(counts["train"]) ^ set(counts["val"]):
        raise UserError(
            f"the classes of train and val differ: {', '.join(sorted(difference)[:5])}", expected="the same in both"
        )  # fmt: skip
    return Prepared(out, sum(counts["train"].values()), sum(counts["val"].values()), len(counts["train"]))
