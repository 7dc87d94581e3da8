"""Training states: number kept, damage, full disks, other architectures, and malicious files."""

import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from toy_run import Run, signals_restored, train, weights

from mae_bench.engine.checkpoint import DataReader
from mae_bench.errors import UserError

RARELY = {"checkpoint_seconds": 1e6}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that saved after each of its 8 steps."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    train(folder, epochs=2, keep_checkpoints=3)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def notes(folder: Path) -> str:
    return (folder / "events.jsonl").read_text()


def steps(folder: Path) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir() if path.is_dir()
    )


def test_the_last_few_are_kept(run: Path) -> None:
    assert sorted(os.listdir(run / "checkpoints")) == [
        "step-00000006",
        "step-00000007",
        "step-00000008",
    ]


def test_names_are_those_of_the_plain_model(run: Path) -> None:
    names = DataReader(run / "checkpoints" / "step-00000008").read_metadata().state_dict_metadata
    known = {
        "model.blocks.0.fc.weight",
        "ema.head.bias",
        "optimizer.stem.weight.exp_avg",
        "optimizer.stem.bias.step",
    }
    assert known <= names.keys()
    assert {name.split(".")[0] for name in names} == {"model", "ema", "optimizer"}


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", b"PK\x03\x04 truncated", None])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "values.json", "manifest.json"])
def test_a_damaged_state_gives_way_to_the_one_before(
    run: Path, finished: Path, file: str, damage: bytes | None
) -> None:
    path = run / "checkpoints" / "step-00000008" / file
    path.unlink() if damage is None else path.write_bytes(damage)
    trainer = train(run, epochs=2, **RARELY)
    assert "step-00000008 cannot be read" in notes(run)
    assert "resumed at step 7 of 8" in notes(run)
    whole = train(finished, epochs=2, **RARELY)
    assert all(torch.equal(tensor, weights(trainer)[name]) for name, tensor in weights(whole).items())
    assert steps(run)[-2:] == [7, 8], "the damaged one was replaced"


def test_every_file_of_a_state_is_read_only_as_it_was_written(run: Path) -> None:
    """One bit in the middle of a file: of a weight, a name or a number that would be loaded as well."""
    state = run / "checkpoints" / "step-00000008"
    for path in sorted(path for path in state.rglob("*") if path.is_file()):
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        (run / "events.jsonl").unlink()
        train(run, epochs=2, **{**RARELY, "keep_checkpoints": 3})
        assert f"{path}" in notes(run)
        assert "resumed at step 7 of 8" in notes(run)


def test_what_cannot_be_read_does_not_count_among_those_that_are_kept(run: Path) -> None:
    (run / "checkpoints" / "step-00000008" / "manifest.json").unlink()
    train(run, epochs=3, **RARELY)
    assert "resumed at step 7 of 12" in notes(run)
    assert steps(run) == [7, 12]


def test_no_readable_state_is_said_and_not_trained_over(run: Path) -> None:
    for path in run.glob("checkpoints/step-*/.metadata"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no training state in .* can be read") as error:
        train(run, epochs=2)
    assert "remove" in error.value.fix


def test_a_metadata_file_that_would_act_does_not(run: Path, tmp_path: Path) -> None:
    class Acts:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "acted"),)

    path = run / "checkpoints" / "step-00000008" / ".metadata"
    path.write_bytes(pickle.dumps(Acts()))
    train(run, epochs=2, **RARELY)
    assert not (tmp_path / "acted").exists()
    assert "resumed at step 7 of 8" in notes(run)


def test_a_full_disk_leaves_the_last_good_state_and_no_half_one(run: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, limits[1])
    )  # a write beyond it is an OSError, as on a full disk
    try:
        with pytest.raises(UserError, match="step 9 could not be written") as error:
            train(run, epochs=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free some" in error.value.fix
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
    assert not (run / "checkpoints" / ".part").exists()
    assert train(run, epochs=3, **RARELY).step == 12


def test_what_a_killed_run_left_half_written_is_taken_away(run: Path) -> None:
    (run / "checkpoints" / ".part").mkdir()
    (run / "checkpoints" / ".part" / "__9_0.distcp").write_bytes(b"half")
    train(run, epochs=3, **RARELY)
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000008", "step-00000012"]
    assert not list(run.glob("checkpoints/step-00000012/__9_0.distcp"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": 4}, r"ema.head.bias was \(3,\) and is \(4,\)"),
        (
            {"statistics": True},
            r"model.norm.bias was absent and is \(16,\)|ema.norm.bias was absent and is \(16,\)",
        ),
        ({"ema": False}, r"ema.blocks.0.fc.bias was \(16,\) and is absent; .*; and 5 more"),
    ],
)
def test_another_architecture_is_named_before_anything_is_loaded(
    run: Path, changes: dict[str, object], named: str
) -> None:
    before = sorted(path for path in (run / "checkpoints").rglob("*"))
    with signals_restored(), pytest.raises(UserError, match=f"another architecture: .*{named}"):
        Run(run, epochs=2, **changes)
    assert sorted(path for path in (run / "checkpoints").rglob("*")) == before
