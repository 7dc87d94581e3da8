"""Several processes: same results as one, a stop at the same step, states that resume on any number."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import NUM_IMAGES, STEPS_PER_EPOCH, train, weights

from mae_bench.errors import Interrupted
from tests.parity import assert_parity

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

Results = dict[str, dict[str, Any]]
SHARDED = {"parallel": "fsdp"}
# Nothing in it depends on who computes which image.
SAME = {"dropout": 0.0, "clip_grad": 0.5, "device_batch_size": 3}
EXACT = SAME | {"dtype": "float64"}  # in float32 AdamW makes steps of the rounding of small gradients
RARELY = {"checkpoint_seconds": 1e6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def results(place: Path, together: Callable[..., Results]) -> Results:
    """Start two processes once for all tests, after runs that are killed and runs of one process."""
    killed = {"killed": {"folder": place / "killed", "kill_at": 6, "on": 1}}
    for folder in ("start 1", "start 2"):
        (place / folder).mkdir()
    with ThreadPoolExecutor() as pool:
        lone = pool.submit(
            together, place / "start 1", 1, {"killed": {"folder": place / "killed alone", "kill_at": 6}}
        )
        assert together(place / "start 2", 2, killed) == lone.result() == {}
    for name in ("alone ddp", "alone fsdp"):
        with pytest.raises(Interrupted):
            train(place / name, stop_at=5, **EXACT, **RARELY)
    runs: dict[str, dict[str, Any]] = {"killed": RARELY}
    for name, parallel in (("ddp", {}), ("fsdp", SHARDED)):
        runs |= {
            f"whole {name}": parallel | RARELY,
            f"stopped {name}": parallel | RARELY | {"stop_at": 4, "on": 1},
            f"resumed {name}": parallel | RARELY | {"folder": place / f"stopped {name}"},
            f"exact {name}": parallel | EXACT | RARELY,
            f"half {name}": parallel | EXACT | RARELY | {"stop_at": 6},
            f"alone {name}": parallel | EXACT | RARELY,
            f"poisoned {name}": parallel | RARELY | {"poison": 5, "on": 1, "epochs": 2},
            f"bfloat16 {name}": parallel | SAME | RARELY | {"amp_dtype": "bfloat16", "narrow": True},
            f"float16 {name}": parallel | SAME | RARELY | {"amp_dtype": "float16"},
            f"compiled {name}": parallel | EXACT | RARELY | {"compile": True},
            f"overflow {name}": parallel
            | SAME
            | RARELY
            | {"amp_dtype": "float16", "clip_grad": None, "overflow": 5, "on": 1},
        }
    runs |= {
        "few bad": {"bad": 4, "epochs": 2, **RARELY},
        "many bad": {"bad": 8, "epochs": 2, **RARELY},
        "statistics": {"statistics": True, "epochs": 2, "hook_epochs": 0.5, **RARELY},
        "hooks": {"hook_epochs": 0.5, "epochs": 2, **SHARDED, **RARELY},
    }
    return together(place, 2, {name: {"folder": place / name} | settings for name, settings in runs.items()})


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, torch.Tensor]:
    """The weights of an exact run in one process."""
    return weights(train(place / "exact alone", **EXACT, **RARELY))


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# FSDP adds the processes' gradients in float32, whatever the weights are in.
TOLERANCES = {"ddp": 1e-9, "fsdp": 8 * torch.finfo(torch.float32).eps}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], parallel: str) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_parity(tensor, other[name], rtol=TOLERANCES[parallel], msg=name)


def indices_by_step(ranks: list[dict[str, Any]]) -> dict[int, list[int]]:
    """The images of each step's global batch, in its order."""
    parts = sorted((step, start, indices) for rank in ranks for step, start, indices in rank["seen"])
    return {step: [i for s, _, indices in parts if s == step for i in indices] for step, _, _ in parts}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(
    results: Results, alone: dict[str, torch.Tensor], parallel: str
) -> None:
    assert_close(results[f"exact {parallel}"]["weights"], alone, parallel)
    losses = [rank["loss"] for rank in results[f"exact {parallel}"]["ranks"]]
    assert losses[0] == losses[1], "the loss of the global batch is everyone's"


def test_gradients_meet_once_a_step(results: Results) -> None:
    assert results["exact ddp"]["ranks"][0]["meets"] == [False, True] * 3 * STEPS_PER_EPOCH


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_stop_that_one_hears_is_everyones_and_the_resumed_run_equals_the_whole_one(
    results: Results, parallel: str
) -> None:
    stopped = results[f"stopped {parallel}"]["ranks"]
    assert [rank["ended"].split(":")[0] for rank in stopped] == ["Interrupted"] * 2
    assert stopped[0]["step"] == stopped[1]["step"] == 6, "one step after the one in which the signal came"
    assert [rank["ended"] for rank in results[f"resumed {parallel}"]["ranks"]] == ["done", "done"]
    assert_equal(results[f"resumed {parallel}"]["weights"], results[f"whole {parallel}"]["weights"])


def test_a_lone_run_that_is_killed_goes_on_bit_for_bit(results: Results, place: Path) -> None:
    killed = train(place / "killed alone", **RARELY)
    assert_equal(weights(killed), weights(train(place / "whole alone", **RARELY)))
    resumed = [
        line
        for line in (place / "killed alone" / "events.jsonl").read_text().splitlines()
        if "resumed at" in line
    ]
    assert len(resumed) == 1


def test_killed_processes_go_on_bit_for_bit(results: Results, place: Path) -> None:
    assert results["killed"]["ranks"][0]["seen"][0][0] >= 4, "it did not begin again"
    assert_equal(results["killed"]["weights"], results["whole ddp"]["weights"])
    lines = (place / "killed" / "log.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f'{{"step": {step}' for step in range(3 * STEPS_PER_EPOCH)
    ]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_hands_over_to_two(
    results: Results, alone: dict[str, torch.Tensor], parallel: str
) -> None:
    assert_close(results[f"alone {parallel}"]["weights"], alone, parallel)
    order, whole = (
        indices_by_step(results[f"alone {parallel}"]["ranks"]),
        indices_by_step(results["exact ddp"]["ranks"]),
    )
    assert order == {step: whole[step] for step in range(6, 3 * STEPS_PER_EPOCH)}, (
        "each step has the same images in the same order"
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_hand_over_to_one(
    results: Results, alone: dict[str, torch.Tensor], place: Path, parallel: str
) -> None:
    assert results[f"half {parallel}"]["ranks"][0]["step"] == 8
    assert_close(weights(train(place / f"half {parallel}", **EXACT, **RARELY)), alone, parallel)


def test_the_order_of_images_is_the_seeds(results: Results) -> None:
    order = indices_by_step(results["exact ddp"]["ranks"])
    assert order == indices_by_step(results["exact fsdp"]["ranks"])
    for epoch in range(3):
        seen = [
            i for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH) for i in order[step]
        ]
        assert len(set(seen)) == len(seen) == NUM_IMAGES // 8 * 8


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_process_stops_all(results: Results, parallel: str) -> None:
    ranks = results[f"poisoned {parallel}"]["ranks"]
    assert ranks[0]["ended"] == ranks[1]["ended"]
    assert "nan at step 5" in ranks[0]["ended"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_mixed_precision_stays_near_full_precision(
    results: Results, alone: dict[str, torch.Tensor], parallel: str, amp_dtype: str
) -> None:
    mixed = results[f"{amp_dtype} {parallel}"]["weights"]
    assert mixed.keys() == alone.keys()
    assert all((tensor - alone[name]).abs().max() <= 0.2 for name, tensor in mixed.items())
    assert (mixed["stem.weight"] - alone["stem.weight"]).abs().max() > 1e-5, "it was mixed"
    assert all(tensor.dtype == torch.float32 for tensor in mixed.values())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_training_is_the_same(
    results: Results, alone: dict[str, torch.Tensor], parallel: str
) -> None:
    assert_close(results[f"compiled {parallel}"]["weights"], alone, parallel)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_overflow_on_one_process_skips_the_step_on_all(results: Results, parallel: str) -> None:
    ranks = results[f"overflow {parallel}"]["ranks"]
    assert [rank["scale"] for rank in ranks] == [2.0**15] * 2, "halved once, on both"
    assert [rank["ended"] for rank in ranks] == ["done", "done"]


def test_bad_images_are_counted_over_all_processes(results: Results) -> None:
    few, many = results["few bad"]["ranks"], results["many bad"]["ranks"]
    names = sorted(f"bad {step} {rank}" for step in range(4) for rank in range(2))
    assert few[0]["bad"] == few[1]["bad"] == names
    assert many[0]["ended"] == many[1]["ended"]
    assert many[0]["ended"].startswith("UserError"), (
        "11 of 100 are more than a tenth, though no process saw so many"
    )


def test_statistics_of_the_first_process_are_everyones(results: Results, place: Path) -> None:
    assert results["statistics"]["weights"]["norm.num_batches_tracked"] == 2 * STEPS_PER_EPOCH


def test_hooks_run_on_the_main_process_alone(results: Results) -> None:
    for name in ("hooks", "statistics"):
        assert [rank["hooked"] for rank in results[name]["ranks"]] == [[2, 4, 6, 8], []]
