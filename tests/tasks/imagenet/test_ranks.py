"""Several processes evaluate each image once, train heads as one process does and share the feature cache."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_bench.job import Outcome
from tasks.imagenet.feature_files import VALUES_FILE
from tests.parity import MEAN, assert_within_rounding
from tests.tasks.imagenet.ranks import Results, run_together
from tests.tasks.imagenet.toy import predictions_of, run_protocol, state_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUNS: dict[str, dict[str, Any]] = {  # what is evaluated by one process and by three
    "finetune": {"global_batch_size": 12},
    "grid": {"global_batch_size": 12},
    "cached": {"global_batch_size": 12},
    "knn": {},
    "few_shot": {},
    "eval_only": {},
}
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0, "drop_path": 0.0}  # each process draws its own
COPIES: dict[str, dict[str, Any]] = {  # what is trained by both, by one in the micro-batches of three
    "finetune": {"global_batch_size": 12} | PLAIN,
    "grid": {"global_batch_size": 12, "device_batch_size": 4},
    "cached": {"global_batch_size": 12, "device_batch_size": 4},
    "grid in shards": {"global_batch_size": 12, "device_batch_size": 4, "parallel": "fsdp"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of all runs; one process and several processes use separate feature caches."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAE_BENCH_CACHE", str(folder / "cache 1"))
        yield folder


@pytest.fixture(scope="module")
def alone(place: Path, faint: Path, sources: dict[str, str]) -> dict[str, Outcome]:
    """Run everything in one process."""
    runs = {name: (name, place / "alone" / name, RUNS[name]) for name in RUNS}
    runs |= {f"copied {name}": (name.split()[0], place / "copied" / name, COPIES[name]) for name in COPIES}
    runs["one by one"] = ("eval_only", place / "alone" / "one by one", {"eval_batch_size": 1})
    return {
        key: run_protocol(name, faint, folder, sources[name], **more)
        for key, (name, folder, more) in runs.items()
    }


@pytest.fixture(scope="module")
def three(place: Path, faint: Path, sources: dict[str, str], alone: dict[str, Outcome]) -> Results:
    """Run the same in three processes: evaluate what one process trained, and train from the start."""
    runs = {name: {"name": name, "folder": place / "three" / name, **RUNS[name]} for name in RUNS}
    for name in ("finetune", "grid", "cached"):
        shutil.copytree(place / "alone" / name / "checkpoints", place / "three" / name / "checkpoints")
    runs |= {
        f"copied {name}": {"name": name.split()[0], "folder": place / "copies" / name, **COPIES[name]}
        for name in COPIES
    }
    runs["one by one"] = {"name": "eval_only", "folder": place / "three" / "one by one", "eval_batch_size": 1}
    runs |= {
        key: {"name": "partial", "folder": place / "partial", "global_batch_size": 12}
        for key in ("partial", "again")
    }
    runs["kept"] = {"name": "finetune", "folder": place / "kept", **RUNS["finetune"]}
    runs["kept"]["earlier"] = [place / "alone" / "finetune"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAE_BENCH_CACHE", str(place / "cache 3"))
        return run_together(
            place,
            3,
            {key: run | {"data": faint, "backbone": sources[run["name"]]} for key, run in runs.items()},
        )


@pytest.mark.parametrize("name", [*RUNS, "one by one"])
def test_three_processes_evaluate_what_one_does(
    name: str, alone: dict[str, Outcome], three: Results, place: Path
) -> None:
    """11 images in batches of 2 are 4, 4 and 3 images per process.

    The batch size changes the last bit of a logit; evaluated one by one, everything is bit-identical.
    """
    assert len({json.dumps(each["metrics"]) for each in three[name]}) == 1, "every process knows the sums"
    found = {metric: each["value"] for metric, each in three[name][0]["metrics"].items()}
    expected = {
        metric: each.value for metric, each in alone[name].metrics.items() if not metric.startswith("best_")
    }
    bits = 0.0 if name == "one by one" else 1e-5
    assert found.pop("loss", 0) == pytest.approx(expected.pop("loss", 0), rel=bits, abs=0)
    assert found == expected
    assert three[name][0]["num_samples"] == 11
    one, several = predictions_of(place / "alone" / name), predictions_of(place / "three" / name)
    assert one.keys() == several.keys()
    assert list(one["indices"]) == list(range(11))
    assert one["margin"].min() > 1e-3, "no score hangs on the last bits"
    for key in one:
        np.testing.assert_allclose(
            several[key], one[key], rtol=bits, atol=bits if key in ("margin", "loss") else 0
        )


def test_features_of_three_processes_are_those_of_one(
    alone: dict[str, Outcome], three: Results, place: Path
) -> None:
    one = {path.relative_to(place / "cache 1"): path for path in place.glob("cache 1/features/**/*.?32")}
    several = {path.relative_to(place / "cache 3"): path for path in place.glob("cache 3/features/**/*.?32")}
    assert one.keys() == several.keys()
    assert len(one) == 2 * 2 * 4, "values and checksums, of train and val, of four sets"
    for name, path in one.items():
        if path.name == VALUES_FILE:
            found, expected = (np.fromfile(each, np.float32) for each in (several[name], path))
            assert_within_rounding(found, expected, roundings=MEAN)
        else:
            assert np.fromfile(several[name], np.uint32).all(), "each image by one of the three"


@pytest.mark.parametrize("name", COPIES)
def test_three_processes_train_what_one_trains(
    name: str, alone: dict[str, Outcome], three: Results, place: Path
) -> None:
    """One process takes the images of three as micro-batches: BatchNorm and gradients see the same images.

    BatchNorm statistics are not compared: as in the reference, they are the first process's. Neither are the
    biases of the attention's keys: their gradient is zero, and AdamW turns its rounding into steps.
    """
    one, several = state_of(place / "copied" / name), state_of(place / "copies" / name)
    assert one.keys() == several.keys()
    compared = [
        key for key in one if not any(part in key for part in ("running_", "num_batches", "qkv.bias"))
    ]
    for key in compared:
        # AdamW and LARS enlarge the rounding of small gradients at each of the steps
        assert_within_rounding(several[key].float(), one[key].float(), roundings=1000, msg=key)
    momenta = [key for key in compared if key.startswith("optimizer.heads.")]
    assert name == "finetune" or len(momenta) == 8 * 2, "weights and biases of all heads got gradients"
    assert len({json.dumps(each["metrics"]) for each in three[f"copied {name}"]}) == 1


def test_three_processes_evaluate_the_model_that_one_has_kept(
    alone: dict[str, Outcome], three: Results, place: Path
) -> None:
    for each in three["kept"]:
        assert each["cost"]["seconds_train"] == alone["finetune"].cost["seconds_train"]
        assert each["metrics"] == three["kept"][0]["metrics"]
        assert each["metrics"]["top1"]["value"] == alone["finetune"].metrics["top1"].value
        assert "the model that alone/finetune trained on" in "".join(each["notes"])
    kept = [place / folder / "trained/model.safetensors" for folder in ("alone/finetune", "kept")]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_a_curve_of_three_processes_is_everyones_and_not_trained_again(three: Results, place: Path) -> None:
    curve = json.loads((place / "partial/curve.json").read_text())["top1"]
    for each in [*three["partial"], *three["again"]]:
        assert {f"top1_blocks_{count}": top1 for count, top1 in curve.items()}.items() <= {
            name: metric["value"] for name, metric in each["metrics"].items()
        }.items()
    times = {each["cost"]["seconds_train"] for each in three["again"]}
    assert times == {three["partial"][0]["cost"]["seconds_train"]}, "what the first process has kept"
