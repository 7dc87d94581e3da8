"""Prepare ImageNet class folders from the original ILSVRC2012 archives: verified, resumable and atomic."""

import csv
import gzip
import hashlib
import io
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_bench.data.sets.index import IndexedImages, build_index, classify_by_folder, sort_key
from mae_bench.data.sets.packing import PackOptions, ProgressCallback, pack_sources
from mae_bench.data.sets.source import ImageSource, is_image
from mae_bench.data.sets.tars import check_end
from mae_bench.errors import NotInstalled, UserError
from mae_bench.files import is_full, write_json, write_text

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {  # from torchvision's datasets/imagenet.py and the download page of image-net.org
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
COUNTS = {"train": 1_281_167, "val": 50_000, "classes": 1000}
NAME = "ImageNet-1K"
WNID = re.compile(r"n\d{8}")
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"

Places = dict[str, tuple[int, int]]  # name -> first byte in the archive, size
Labels = list[str] | dict[str, str]  # WNIDs of the validation images in order, or by name without suffix


@dataclass(frozen=True)
class Prepared:
    """Number of images per split, and of classes, in a prepared set."""

    root: Path
    num_train: int
    num_val: int
    num_classes: int


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
    """Write out/train/WNID/*.JPEG and out/val/WNID/*.JPEG from the archives in `source`, or resume doing so.

    Classes are in the order of their WordNet ids, which gives the usual labels.

    check: compare the archives' MD5 and the number of images with those of ILSVRC2012.
    val_classes: text file with one validation image and its WNID per line (or Kaggle's LOC_val_solution.csv),
    used instead of the devkit.
    packed: options of a packed set to write instead, directly from the archives, with `num_workers`
    processes.
    Raises UserError if an archive is missing, damaged or not the published one, or if the disk is full.
    """
    needed = [TRAIN, VAL] if val_classes else [TRAIN, VAL, DEVKIT]
    missing = [name for name in needed if not (source / name).is_file()]
    if missing:
        fix = "download them from image-net.org"
        if missing == [DEVKIT]:
            fix = "give a file with the classes of the validation images, which replaces the devkit"
        raise UserError(
            f"{source} lacks {', '.join(missing)}",
            expected=f"{', '.join(needed)}, as published by image-net.org",
            fix=fix,
        )
    with _explain_errors(out):
        if check:
            _check_md5([source / name for name in needed], out.with_name(f".{out.name}.checked"), progress)
        labels = _read_class_list(val_classes) if val_classes else _read_devkit(source / DEVKIT)
        name = NAME if check else out.resolve().name
        if packed:
            sources = _index_archives(source, labels)
            train, val = sources["train"], sources["val"]
            prepared = Prepared(out, len(train), len(val), len(train.classes))
            _check_counts(prepared, check)
            pack_sources(sources, out, packed, name=name, num_workers=num_workers, progress=progress)
            return prepared
        _extract_train(source / TRAIN, out / "train", progress)
        _extract_val(source / VAL, out / "val", labels, progress)
        prepared = _count(out)
        _check_counts(prepared, check)
        write_json(out / "dataset.json", {"name": name})
    return prepared


def _check_counts(prepared: Prepared, check: bool) -> None:
    found = {"train": prepared.num_train, "val": prepared.num_val, "classes": prepared.num_classes}
    if check and found != COUNTS:
        raise UserError(
            f"{prepared.root} has {found}",
            expected=str(COUNTS),
            fix=f"remove {prepared.root} and prepare it again",
        )


def _index_archives(source: Path, labels: Labels) -> dict[str, ImageSource]:
    """Return the images at their places in the archives; in a tar inside a tar, the offsets add up."""
    train: Places = {}
    with tarfile.open(source / TRAIN, "r:") as outer:
        for member in _list_class_tars(outer, source / TRAIN):
            wnid = Path(member.name).stem
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                for image in inner:
                    _check_image(image, source / TRAIN)
                    start = member.offset_data + image.offset_data
                    train[f"{wnid}/{Path(image.name).name}"] = (start, image.size)
                check_end(inner)
    val: Places = {}
    with tarfile.open(source / VAL, "r:") as file:
        for member, wnid in _label_members(file, labels, source / VAL):
            _check_image(member, source / VAL)
            val[f"{wnid}/{Path(member.name).name}"] = (member.offset_data, member.size)
    return {"train": _open_archive(train, source / TRAIN), "val": _open_archive(val, source / VAL)}


def _open_archive(places: Places, archive: Path) -> ImageSource:
    names = sorted(places, key=sort_key)
    targets, classes = classify_by_folder(names)
    index = build_index(
        names,
        [places[name][1] for name in names],
        targets,
        classes,
        files=[str(archive.absolute())],
        shard=[0] * len(names),
        starts=[places[name][0] for name in names],
    )
    return IndexedImages(index, "/")


@contextmanager
def _explain_errors(out: Path) -> Iterator[None]:
    """Turn errors of tar files and of the file system into UserErrors."""
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"an archive is damaged: {error}", fix="download it again") from error
    except OSError as error:
        full = is_full(error)
        raise UserError(
            f"{out} cannot be created: {error}",
            expected="about 155 GB of free space" if full else "",
            fix=f"{'free some space' if full else 'solve this'}, then re-run the same command to resume",
        ) from error


def _check_md5(archives: list[Path], record: Path, progress: ProgressCallback | None) -> None:
    known = set(record.read_text(encoding="utf-8").splitlines()) if record.is_file() else set()
    for path in archives:
        mark = f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
        if mark in known:
            continue
        found = _compute_md5(path, progress)
        if found != MD5[path.name]:
            raise UserError(
                f"{path} has MD5 {found}",
                expected=f"{MD5[path.name]}, the published archive",
                fix="download it again; or use --no-check if it is intentionally another archive",
            )
        known.add(mark)
        write_text(record, "".join(f"{line}\n" for line in sorted(known)))


def _compute_md5(path: Path, progress: ProgressCallback | None) -> str:
    digest, size = hashlib.md5(usedforsecurity=False), path.stat().st_size
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            if progress:
                progress(f"checking {path.name}", file.tell(), size)
    return digest.hexdigest()


def _read_devkit(path: Path) -> list[str]:
    """Return the WNID of each validation image, in order.

    meta.mat numbers the classes, and the ground truth is the number of each image's class.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise NotInstalled(
            f"reading the devkit's meta.mat needs scipy: {error}",
            fix="python -m pip install scipy, or give a file with the classes of the validation images",
        ) from error
    try:
        with tarfile.open(path, "r:gz") as file:
            contents = {name: _read_member(file, name, path) for name in (META, TRUTH)}
        synsets = loadmat(io.BytesIO(contents[META]), squeeze_me=True)["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]  # the others are their ancestors
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        return [wnids[int(number)] for number in contents[TRUTH].split()]
    except (
        gzip.BadGzipFile,
        EOFError,
        zlib.error,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
    ) as error:
        raise UserError(
            f"{path} is damaged: {error!r}", expected="the devkit of ILSVRC2012", fix="download it again"
        ) from error


def _read_member(file: tarfile.TarFile, ending: str, path: Path) -> bytes:
    member = next((member for member in file if member.isreg() and member.name.endswith(ending)), None)
    content = file.extractfile(member) if member else None
    if content is None:
        raise UserError(f"{path} lacks {ending}", expected="the devkit of ILSVRC2012")
    return content.read()


def _read_class_list(path: Path) -> dict[str, str]:
    """Return the WNID of each validation image, by name without suffix, from a text or CSV file."""
    labels: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = list(csv.reader(re.sub(r"[ \t]+", ",", line) for line in lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}", expected="a text or CSV file in UTF-8") from error
    for row in rows:
        wnid = next((cell for cell in row if WNID.fullmatch(cell)), None)
        if row and wnid and row[0] != wnid:
            labels[Path(row[0]).stem] = wnid
    if not labels:
        raise UserError(
            f"{path} contains no classes",
            expected="one image per line, such as ILSVRC2012_val_00000001.JPEG n01751748",
        )
    return labels


def _extract_train(archive: Path, folder: Path, progress: ProgressCallback | None) -> None:
    """Extract a tar with one tar per class; the folder of a class appears once it is complete."""
    with tarfile.open(archive, "r:") as outer:
        members = _list_class_tars(outer, archive)
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


def _list_class_tars(outer: tarfile.TarFile, archive: Path) -> list[tarfile.TarInfo]:
    members = [member for member in outer if member.isreg()]
    check_end(outer)
    for member in members:
        if not WNID.fullmatch(Path(member.name).stem):
            raise UserError(
                f"{archive} has a member {member.name}", expected="one tar per class, such as n01440764.tar"
            )
    return members


def _label_members(file: tarfile.TarFile, labels: Labels, archive: Path) -> list[tuple[tarfile.TarInfo, str]]:
    """Return the validation images, sorted by name, with their WNIDs."""
    members = sorted((member for member in file if member.isreg()), key=lambda member: Path(member.name).name)
    check_end(file)
    stems = [Path(member.name).stem for member in members]
    if isinstance(labels, list):
        if len(labels) != len(members):
            raise UserError(
                f"{archive} has {len(members)} images",
                expected=f"{len(labels)}, the number of labels in the devkit",
            )
        labels = dict(zip(stems, labels, strict=True))
    unlabelled = [stem for stem in stems if stem not in labels]
    if unlabelled:
        raise UserError(
            f"no class is given for {unlabelled[0]}", expected="a class for every validation image"
        )
    return [(member, labels[stem]) for member, stem in zip(members, stems, strict=True)]


def _extract_val(archive: Path, folder: Path, labels: Labels, progress: ProgressCallback | None) -> None:
    """Extract a flat tar into one folder per class; `folder` appears once it is complete."""
    if folder.is_dir():
        return
    part = folder.with_name(f".{folder.name}.part")
    with tarfile.open(archive, "r:") as file:
        members = _label_members(file, labels, archive)
        for done, (member, wnid) in enumerate(members, 1):
            _extract(file, member, part / wnid, archive)
            if progress and (done % 1000 == 0 or done == len(members)):
                progress("val", done, len(members))
    part.rename(folder)


def _check_image(member: tarfile.TarInfo, archive: Path) -> None:
    """Raise UserError for a member that is not an image file, is a link, or is in a folder."""
    name = Path(member.name).name
    if not (member.isreg() and member.name.removeprefix("./") == name and is_image(name)):
        raise UserError(
            f"{archive} has a member {member.name!r}", expected="only images, without folders or links"
        )


def _extract(file: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, archive: Path) -> None:
    """Extract one image under its bare name."""
    _check_image(member, archive)
    path = folder / Path(member.name).name
    if path.is_file() and path.stat().st_size == member.size:  # extracted by an earlier call
        return
    folder.mkdir(parents=True, exist_ok=True)
    content: Any = file.extractfile(member)
    with open(path, "wb") as out:
        shutil.copyfileobj(content, out, 1 << 20)
    if path.stat().st_size != member.size:
        raise tarfile.ReadError(f"{archive} ends in the middle of {member.name}")


def _count(out: Path) -> Prepared:
    train, val = (_count_images(out / split) for split in ("train", "val"))
    difference = sorted(set(train) ^ set(val))
    if difference:
        raise UserError(
            f"the classes of train and val differ: {', '.join(difference[:5])}", expected="the same in both"
        )
    return Prepared(out, sum(train.values()), sum(val.values()), len(train))


def _count_images(split: Path) -> dict[str, int]:
    """Return the number of images in each class folder."""
    folders = [folder for folder in split.iterdir() if WNID.fullmatch(folder.name)]
    return {folder.name: sum(1 for _ in folder.iterdir()) for folder in folders}
