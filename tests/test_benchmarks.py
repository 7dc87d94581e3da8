"""The benchmarks: known answers of their arithmetic, and each script run to its end at toy size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    asymmetric,
    data_loading,
    gpu_pretrain,
    index_paths,
    linear_probe,
    orphans,
    pretrain_step,
)
from benchmarks.measure import Table, Times, command, interleave, ratio, run_main, write_table
from benchmarks.peers import MASK_RATIO
from mae_bench.environment.code import digest_code
from mae_bench.models.mae import MAE


def test_interleave_runs_the_calls_in_turns_and_times_all_but_the_warm_up():
    calls: list[str] = []
    samples = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1
    )
    assert calls == ["a", "b"] * 4
    assert [len(times.cpu) for times in samples.values()] == [3, 3]
    assert [len(times.wall) for times in samples.values()] == [3, 3]


def test_ratio_is_that_of_the_medians():
    found = ratio([2.0, 4.0, 90.0], [1.0, 2.0, 1.5])
    assert found.median == 4.0 / 1.5
    assert found.low <= found.median <= found.high


def test_ratio_of_proportional_rounds_has_no_spread():
    """Rounds are drawn in pairs: slowing both down in some rounds does not widen the interval."""
    rounds = [1.0, 5.0, 2.0, 9.0, 1.5, 3.0, 7.0]
    found = ratio([3 * seconds for seconds in rounds], rounds)
    assert (found.median, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_ratio_spreads_with_its_samples():
    narrow, wide = ratio([2.0, 2.1, 1.9] * 5, [1.0] * 15), ratio([1.0, 2.0, 4.0] * 5, [1.0] * 15)
    assert wide.high - wide.low > narrow.high - narrow.low


def test_ratio_refuses_unequal_rounds():
    with pytest.raises(ValueError, match="one of each per round"):
        ratio([1.0, 2.0], [1.0])


def test_report_is_written_as_markdown_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/index_paths.py"])
    table = Table("Speed", ["peer", "ratio"], [["hf", ratio([2.0], [1.0])]], note="Higher is better.")
    write_table("A report", [table], {"samples": Times([1.0], [2.0])}, tmp_path / "new" / "report.md")
    text = (tmp_path / "new" / "report.md").read_text()
    assert "| hf | 2.00 [2.00, 2.00] |" in text
    assert text.strip() == capsys.readouterr().out.strip()
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["data"]["samples"] == {"cpu": [1.0], "wall": [2.0]}
    assert content["tables"][0]["rows"][0][1]["median"] == 2.0
    assert content["environment"]["command"] == "python -m benchmarks.index_paths"
    assert content["environment"]["code"] == digest_code("benchmarks.index_paths")


def test_command_leaves_this_machines_folders_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/benchmarks/name.py", "--data", "/home/me/set", "--out", "results/a b"]
    )
    assert command() == "python -m benchmarks.name --data set --out 'results/a b'"


def test_contenders_have_the_same_loss_until_one_of_them_differs():
    torch.manual_seed(0)
    found = pretrain_step.build_contenders("toy", "float32", compiled=False)
    imgs, noise = pretrain_step.draw_batch("toy", 2)
    assert len(found) == 4
    pretrain_step.require_equal_losses(found, imgs, noise, 1e-5)
    with torch.no_grad():
        next(found["timm blocks"].model.parameters()).mul_(1.1)
    with pytest.raises(AssertionError, match="timm blocks"):
        pretrain_step.require_equal_losses(found, imgs, noise, 1e-5)


def test_contenders_steps_change_the_weights_alike():
    """After one step the losses still agree: gradients and AdamW are the same, with and without groups."""
    torch.manual_seed(0)
    found = pretrain_step.build_contenders("toy", "float32", compiled=False)
    imgs, noise = pretrain_step.draw_batch("toy", 2)
    before = found[pretrain_step.OURS].forward(imgs, noise).item()
    for one in found.values():
        one.step(imgs, noise)
    assert abs(found[pretrain_step.OURS].forward(imgs, noise).item() - before) > 1e-4
    pretrain_step.require_equal_losses(
        found, imgs, noise, 1e-4
    )  # biases and norms are decayed by the peers alone


@pytest.mark.parametrize(
    ("size", "depth"), [("base", 8), ("large", 8), ("huge", 8), ("large", 1), ("huge", 1)]
)
def test_flops_of_the_designs_have_the_analytic_ratio(size: str, depth: int):
    counted = asymmetric.count_gflops(size, depth)
    found = counted[asymmetric.FULL] / counted[asymmetric.ASYMMETRIC]
    assert found == pytest.approx(asymmetric.ANALYTIC[size, depth], rel=0.04)


def test_reference_flops_are_those_of_the_analysis():
    assert asymmetric.count_gflops("base", 8)["reference"] == pytest.approx(58.5, rel=0.01)


def test_both_designs_share_their_blocks_and_train(monkeypatch: pytest.MonkeyPatch):
    seen: list[MAE] = []
    monkeypatch.setattr(asymmetric, "run_step", lambda model, imgs, noise: seen.append(model))
    asymmetric.measure("toy", 1, batch_size=2, repeats=1)
    ours, full = seen[:2]
    assert full.options.encoder_mask_tokens
    assert not ours.options.encoder_mask_tokens
    assert ours.encoder is full.encoder
    assert full(torch.zeros(2, 3, 64, 64), MASK_RATIO)[0].isfinite()


@pytest.mark.parametrize("name", linear_probe.GRIDS)
def test_a_grid_has_as_many_heads_as_it_says(name: str):
    spec = linear_probe.vit_spec("small")
    with torch.device("meta"):
        probe, optimizer = linear_probe.build_probe(
            linear_probe.build_vit(spec), spec, linear_probe.GRIDS[name], 10
        )
    assert len(probe.heads) == len(optimizer.param_groups) == int(name.split()[0])
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == max(
        1, len(linear_probe.GRIDS[name].get("lrs", []))
    )


def test_an_orphan_is_counted_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A runner whose child lives on without it."""
    monkeypatch.setattr(orphans, "PATIENCE_SECONDS", 0.1)
    code = "import subprocess; subprocess.run(['sleep', '1000'])"

    def start(mark: str, folder: Path) -> int:
        return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {orphans.MARK: mark}).pid

    (kill,) = orphans.kill_many({"careless": start}, 1, seed=0, folder=tmp_path)
    assert (kill.alive, kill.left) == (1, 1)
    (row,) = orphans.summarise([kill]).rows
    assert row[:4] == ["careless", 1, "1.0", 1]


RUNS = {
    pretrain_step: [
        "--sizes",
        "toy",
        "--dtypes",
        "float32",
        "bfloat16",
        "--batch-size",
        "2",
        "--repeats",
        "1",
    ],
    asymmetric: ["--sizes", "toy", "--decoder-depths", "1", "--batch-size", "2", "--repeats", "1"],
    gpu_pretrain: ["--device", "cpu", "--tiny"],
    linear_probe: ["--size", "toy", "--batch-size", "4", "--classes", "10", "--repeats", "1"],
}


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__.split(".")[-1])
def test_script_runs_to_its_end(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [script.__file__, *RUNS[script], "--out", str(tmp_path / "table")])
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / "table.json").read_text())
    assert all(len(row) == len(table["header"]) for table in content["tables"] for row in table["rows"])
    assert "Error" not in (tmp_path / "table.md").read_text()


WRONG: list[tuple[Any, list[str], str]] = [
    (asymmetric, ["--repeats", "0"], "--repeats"),
    (asymmetric, ["--decoder-depths", "none"], "--decoder-depths"),
    (data_loading, [], "--photos"),
    (data_loading, ["--photos", "nowhere"], "--photos"),
    (data_loading, ["--images", "0"], "--images"),
    (gpu_pretrain, ["--device", "tpu"], "--device"),
    (gpu_pretrain, ["--device", "cpu", "--packed", "nowhere"], "--packed nowhere"),
    (index_paths, ["--folder", "nowhere"], "--folder nowhere"),
    (index_paths, ["--starts", "0"], "--starts"),
    (linear_probe, ["--device", "tpu"], "--device"),
    (linear_probe, ["--threads", "-1"], "--threads"),
    (pretrain_step, ["--sizes", "giant"], "--sizes"),
    (pretrain_step, ["--batch-size", "0"], "--batch-size"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_arguments_end_without_a_traceback(
    script: Any,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run_main(script.main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def read_result_rows() -> list[list[str]]:
    """The cells of the table in benchmarks/results/README.md, without its header."""
    lines = (RESULTS / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "folder"]


def test_every_folder_of_results_is_listed_once():
    listed = []
    for row in read_result_rows():
        link = re.fullmatch(r"\[(.+)\]\(\1\)", row[0])
        assert link, row[0]
        listed.append(link[1])
    assert sorted(listed) == sorted(path.name for path in RESULTS.iterdir() if path.is_dir())


def test_results_with_uncommitted_changes_are_named():
    for row in read_result_rows():
        folder = RESULTS / row[0].split("]")[0].removeprefix("[")
        records = list(folder.glob("cells/*/*/record.json"))
        dirty = [path for path in records or folder.glob("*.json") if "-dirty" in path.read_text()]
        if records:
            want = f"{len(dirty)} of {len(records)} records" if dirty else "none"
        else:
            want = ", ".join(f"`{name}`" for name in sorted(path.stem for path in dirty)) or "none"
        assert row[3] == want
