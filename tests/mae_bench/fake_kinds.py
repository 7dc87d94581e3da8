"""Job kinds that need no framework: run as a script, this is `mae-bench` with them."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Literal

from mae_bench.cli.app import main
from mae_bench.config import Config, NotIdentity
from mae_bench.errors import NotInstalled, UserError
from mae_bench.job import EXPORT, Job, Outcome
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.registry import KINDS, Kind

FAKES = {
    "fake_maker": Kind("fake_kinds:MakerConfig", "fake_kinds:run", "", emits_backbone=True),
    "fake_pretraining": Kind(
        "fake_kinds:PretrainingConfig", "fake_kinds:run_together", "", emits_backbone=True, distributed=True
    ),
    "fake_transfer": Kind("fake_kinds:TransferConfig", "fake_kinds:run", "imagenet"),
}


class MakerConfig(Config):
    kind: str
    protocol: str = "fake"
    score: float = 1.0
    behave: Literal[
        "well",
        "user error",
        "not installed",
        "exception",
        "full disk",
        "SIGKILL",
        "exit 3",
        "wait",
        "wait with children",
    ] = "well"


class PretrainingConfig(Config):
    kind: str
    protocol: str = "fake"
    behave: Literal["well", "user error", "exception on rank 1", "exit 3 on rank 1", "wait"] = "well"
    steps: int = 5
    global_batch_size: int = 8
    device_batch_size: NotIdentity[int | None] = None


class TransferConfig(MakerConfig):
    data: NotIdentity[str]


def run(config: MakerConfig, job: Job, progress: Progress) -> Outcome:
    with open(job.dir / "runs.txt", "a", encoding="utf-8") as file:
        file.write("run\n")
    if job.backbone and not Path(job.backbone, "weights").is_file():
        raise UserError("started before its backbone was there")
    misbehave(config.behave, job, progress)
    if FAKES[config.kind].emits_backbone:
        (job.dir / EXPORT).mkdir(exist_ok=True)
        (job.dir / EXPORT / "weights").write_text(
            f"{job.name}, run {len((job.dir / 'runs.txt').read_text().split())}"
        )
    weights = Path(job.backbone or job.dir / EXPORT, "weights")
    return Outcome(
        task=FAKES[config.kind].task,
        dataset="toy",
        split="val",
        num_samples=4,
        metrics={"top1": Metric(config.score + job.seed)},
        main_metric="top1",
        data_digest="",
        backbone_spec={},
        backbone_digest=weights.read_text() if weights.exists() else "",
        conversion_report={"source": job.backbone} if job.backbone else {},
        notes=[getattr(config, "data", "")],
        artefacts={"runs": "runs.txt", "missing": "missing.txt"},
    )


def misbehave(how: str, job: Job, progress: Progress) -> None:
    if how == "user error":
        raise UserError("a given thing", expected="another thing", fix="mend it")
    if how == "not installed":
        raise NotInstalled("the module 'x' is not installed", fix="pip install x")
    if how == "exception":
        raise ZeroDivisionError("what nobody foresaw")
    if how == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(job.dir / EXPORT))
    if how == "SIGKILL":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit 3":
        os._exit(3)
    if how.startswith("wait") and not (job.dir / "state").exists():
        if how == "wait with children":
            start_children()
        wait_to_be_stopped(job, progress)


def run_together(config: PretrainingConfig, job: Job, progress: Progress) -> Outcome:
    """Like a pretraining on several ranks: they agree on the step to stop after; rank 0 saves the state."""
    from mae_bench.engine.distributed import sum_over_ranks, world

    here, state = world(), job.dir / "state"
    (job.dir / f"pid-{here.rank}").write_text(str(os.getpid()))
    if config.behave == "user error":
        raise UserError("a given thing", expected="another thing", fix="mend it")
    if here.rank == 1 and config.behave == "exception on rank 1":
        raise ZeroDivisionError("what nobody foresaw")
    if here.rank == 1 and config.behave == "exit 3 on rank 1":
        os._exit(3)
    step, trained = (int(word) for word in state.read_text().split()) if state.exists() else (0, 0)
    waits = config.behave == "wait" and not step
    with progress.deferred():
        progress.stage("train", config.steps)
        while step < config.steps or waits:
            ranks, stop = (int(value) for value in sum_over_ranks([1, progress.should_stop]))
            step, trained = step + 1, trained + ranks
            progress.step(step, loss=1.0)
            if stop:
                if here.is_main:
                    state.write_text(f"{step} {trained}")
                progress.interrupt()
            time.sleep(0.05 if waits else 0)
    if here.is_main:
        (job.dir / EXPORT).mkdir(exist_ok=True)
        (job.dir / EXPORT / "weights").write_text(job.name)
    return Outcome(
        task="pretrain",
        dataset="toy",
        split="train",
        num_samples=4,
        metrics={"ranks": Metric(trained / step, "", "higher"), "steps": Metric(step, "", "higher")},
        main_metric="ranks",
        data_digest="",
        backbone_spec={},
        backbone_digest=job.name,
    )


def start_children() -> None:
    """Like a loader: two forked processes that are busy for long and watch nobody."""
    for _ in range(2):
        multiprocessing.get_context("fork").Process(target=sleep_long, daemon=True).start()


def sleep_long() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1000)


def wait_to_be_stopped(job: Job, progress: Progress) -> None:
    """Like a training: saves when asked to stop; the next run finds the state and ends."""
    (job.dir / "pid").write_text(str(os.getpid()))
    progress.stage("train", 1000)
    for step in range(1000):
        if progress.should_stop:
            (job.dir / "state").write_text(str(step))
        progress.step(step, loss=1.0)
        time.sleep(0.05)


if __name__ == "__main__":
    KINDS.update(FAKES)
    main()
