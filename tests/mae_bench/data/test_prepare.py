"""ImageNet class folders are prepared from toy archives with the nesting of ILSVRC2012."""

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mae_bench.data import prepare
from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.pack import pack_set
from mae_bench.data.prepare import DEVKIT, TRAIN, VAL, prepare_imagenet
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.packing import PackOptions
from mae_bench.errors import NotInstalled, UserError

Picture = Callable[..., bytes]
WNIDS = ["n01440764", "n01443537", "n02119789"]
NUMBERS = {
    "n02119789": 1,
    "n01440764": 2,
    "n01443537": 3,
}  # ILSVRC2012_ID: another order than that of the WNIDs
TRUTH = [3, 1, 2, 1]


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def meta() -> bytes:
    """Return synsets as in the devkit's meta.mat: a struct array, leaves first, then an inner node."""
    savemat = pytest.importorskip(
        "scipy.io", reason="scipy, for the devkit's meta.mat, is not installed"
    ).savemat
    rows = [(number, wnid, "words", "gloss", 0) for wnid, number in NUMBERS.items()] + [
        (1001, "n00001740", "entity", "", 3)
    ]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, kinds).reshape(-1, 1)})
    return file.getvalue()


@pytest.fixture
def archives(tmp_path: Path, picture: Picture) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    classes = {
        f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": picture(10 * n + i) for i in range(2)})
        for n, wnid in enumerate(WNIDS)
    }
    (folder / TRAIN).write_bytes(tar(classes))
    names = [f"ILSVRC2012_val_{i:08}.JPEG" for i in (2, 1, 4, 3)]  # the archive is not sorted by name
    (folder / VAL).write_bytes(tar({name: picture(0) + name.encode() for name in names}))
    return folder


@pytest.fixture
def devkit(archives: Path) -> Path:
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    members = {
        "data/meta.mat": meta(),
        "data/ILSVRC2012_validation_ground_truth.txt": truth,
        "readme.txt": b"",
    }
    (archives / DEVKIT).write_bytes(
        tar({f"ILSVRC2012_devkit_t12/{name}": text for name, text in members.items()}, "w:gz")
    )
    return archives


def listing(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.JPEG")}


def expected(picture: Picture) -> dict[str, bytes]:
    train = {f"train/{w}/{w}_{i}.JPEG": picture(10 * n + i) for n, w in enumerate(WNIDS) for i in range(2)}
    wnid = {number: name for name, number in NUMBERS.items()}
    names = [f"ILSVRC2012_val_{i:08}.JPEG" for i in (1, 2, 3, 4)]
    return train | {
        f"val/{wnid[n]}/{name}": picture(0) + name.encode() for name, n in zip(names, TRUTH, strict=True)
    }


def test_archives_become_the_layout(devkit: Path, tmp_path: Path, picture: Picture) -> None:
    steps: list[tuple[str, int, int]] = []
    made = prepare_imagenet(devkit, tmp_path / "out", lambda *step: steps.append(step), check=False)
    assert (made.num_train, made.num_val, made.num_classes) == (6, 4, 3)
    assert listing(tmp_path / "out") == expected(picture)
    assert open_images(tmp_path / "out", "train").classes == WNIDS
    assert check_layout("imagenet", tmp_path / "out").splits == {"train": 6, "val": 4}
    assert steps[-1] == ("val", 4, 4)
    assert ("train", 3, 3) in steps


def test_archives_become_a_packed_set_without_being_unpacked(devkit: Path, tmp_path: Path) -> None:
    folders, out = tmp_path / "folders", tmp_path / "packed"
    prepare_imagenet(devkit, folders, check=False)
    made = prepare_imagenet(devkit, out, check=False, packed=PackOptions(short_side=8), num_workers=1)
    pack_set(folders, tmp_path / "again", short_side=8)
    assert (made.num_train, made.num_val, made.num_classes) == (6, 4, 3)
    assert {path.name for path in out.iterdir()} == {
        "packed.json",
        "train.checksums",
        "train.data",
        "train.index",
        "val.checksums",
        "val.data",
        "val.index",
    }
    for split in ("train", "val"):
        one, other = open_images(out, split), open_images(tmp_path / "again", split)
        assert [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))]
        assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(other))]
        assert (one.targets.tolist(), one.classes) == (other.targets.tolist(), other.classes)
    assert check_layout("imagenet", out).name == "packed-8px-q90"
    assert check_layout("imagenet", out).digest == check_layout("imagenet", tmp_path / "again").digest


@pytest.mark.parametrize("form", ["{name}.JPEG {wnid}", "{name},{wnid} 85 1 499 272", "{name}.JPEG\t{wnid}"])
def test_a_list_of_classes_stands_in_for_the_devkit(
    archives: Path, tmp_path: Path, picture: Picture, form: str
) -> None:
    wnid = {number: name for name, number in NUMBERS.items()}
    lines = [form.format(name=f"ILSVRC2012_val_{i:08}", wnid=wnid[n]) for i, n in enumerate(TRUTH, 1)]
    (tmp_path / "list").write_text("ImageId,PredictionString\n" + "\n".join(lines))
    prepare_imagenet(archives, tmp_path / "out", check=False, val_classes=tmp_path / "list")
    assert listing(tmp_path / "out") == expected(picture)
    (tmp_path / "list").write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="no class is given for ILSVRC2012_val_00000004"):
        prepare_imagenet(archives, tmp_path / "other", check=False, val_classes=tmp_path / "list")


def test_md5_and_counts(
    devkit: Path, tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"(?s){TRAIN} has MD5.*{prepare.MD5[TRAIN]}"):
        prepare_imagenet(devkit, tmp_path / "out")
    assert not list(tmp_path.glob("out/train"))
    monkeypatch.setattr(
        prepare, "MD5", {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in devkit.iterdir()}
    )
    with pytest.raises(UserError, match="'train': 6"):
        prepare_imagenet(devkit, tmp_path / "out")
    monkeypatch.setattr(prepare, "COUNTS", {"train": 6, "val": 4, "classes": 3})
    monkeypatch.setattr(
        prepare, "_compute_md5", lambda *_: pytest.fail("an archive is read again that was right")
    )
    prepare_imagenet(devkit, tmp_path / "out")
    assert listing(tmp_path / "out") == expected(picture)
    assert check_layout("imagenet", tmp_path / "out").name == "ImageNet-1K"


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("stop_at", range(0, 10, 2))
def test_a_stopped_call_goes_on(
    devkit: Path, tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    written: list[str] = []
    original = prepare._extract

    def extract(file: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, archive: Path) -> None:
        if len(written) == stop_at:
            (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / member.name).write_bytes(b"half")
            raise Stopped
        written.append(member.name)
        original(file, member, folder, archive)

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_extract", extract)
        with pytest.raises(Stopped):
            prepare_imagenet(devkit, tmp_path / "out", check=False)
    with pytest.raises(UserError):
        check_layout("imagenet", tmp_path / "out")
    prepare_imagenet(devkit, tmp_path / "out", check=False)
    assert listing(tmp_path / "out") == expected(picture)
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.parametrize("name", ["../evil.JPEG", "/tmp/evil.JPEG", "n01440764/../../evil.JPEG", "evil.sh"])
def test_members_that_lead_elsewhere_are_refused(
    archives: Path, tmp_path: Path, picture: Picture, name: str
) -> None:
    (archives / TRAIN).write_bytes(tar({"n01440764.tar": tar({name: picture(0)})}))
    (tmp_path / "list").write_text("ILSVRC2012_val_00000001 n01440764")
    with pytest.raises(UserError, match="evil"):
        prepare_imagenet(archives, tmp_path / "out", check=False, val_classes=tmp_path / "list")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_link_is_refused(archives: Path, tmp_path: Path) -> None:
    file, link = io.BytesIO(), tarfile.TarInfo("a.JPEG")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(link)
    (archives / TRAIN).write_bytes(tar({"n01440764.tar": file.getvalue()}))
    (tmp_path / "list").write_text("ILSVRC2012_val_00000001 n01440764")
    with pytest.raises(UserError, match="without folders or links"):
        prepare_imagenet(archives, tmp_path / "out", check=False, val_classes=tmp_path / "list")


def test_what_lacks_or_is_damaged_is_named(devkit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{TRAIN}, {VAL}, {DEVKIT}"):
        prepare_imagenet(tmp_path / "nowhere", tmp_path / "out")
    whole = (devkit / TRAIN).read_bytes()
    for cut in (len(whole) // 2 - 300, whole.index(b"n01443537.tar")):
        (devkit / TRAIN).write_bytes(whole[:cut])
        with pytest.raises(UserError, match="damaged"):
            prepare_imagenet(devkit, tmp_path / "out", check=False)
    (devkit / TRAIN).write_bytes(whole)
    (devkit / DEVKIT).unlink()
    with pytest.raises(UserError, match=f"(?s)lacks {DEVKIT}.*give a file"):
        prepare_imagenet(devkit, tmp_path / "out", check=False)


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_damage_to_an_archive_is_named_or_changes_only_the_images(
    devkit: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow, which the mutants need, is not installed")
    from tests.mae_bench.data.sets.mutants import mutate

    data, draw, num_refused = (devkit / name).read_bytes(), np.random.default_rng(0), 0
    for number in range(12):
        (devkit / name).write_bytes(mutate(data, draw))
        try:
            prepare_imagenet(devkit, tmp_path / str(number), check=False)
        except UserError:
            num_refused += 1
    assert num_refused > 0


def test_without_scipy_the_command_is_given(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(NotInstalled, match="pip install scipy"):
        prepare_imagenet(devkit, tmp_path / "out", check=False)
