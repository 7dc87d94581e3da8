"""The trained model of a cell, kept so that another cell can evaluate it without training again."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from backbones.writing import write_safetensors
from mae_bench.config import KeepConfig, training_identity
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.environment.code import digest_kind
from mae_bench.environment.provenance import git_hash, now
from mae_bench.files import json_digest, write_json
from mae_bench.job import Outcome
from mae_bench.models.cost import peak_memory_mib
from mae_bench.registry import kind
from mae_bench.seal import BrokenSeal, check_seal, read_sealed_json, seal_json, write_sealed
from tasks.context import TaskContext

TRAINED = "trained"  # subfolder of a job with its trained model
WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE = "training.json"
FORMAT = 1  # of that folder

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Training:
    """What a record states about a training.

    Attributes:
        seconds: over all runs of the job.
        images_per_second: number of images trained on per second.
        bad_images: the reason by name for each training image that does not decode.
        epochs: number of passes over the images, where the protocol counts them.
        peak_memory_mib: see `mae_bench.models.cost`.
        cell, finished, git_hash, code_digest: which cell trained, when, and with which code.
        reused: whether another cell trained.
    """

    seconds: float
    images_per_second: float
    bad_images: dict[str, str]
    epochs: float = 0.0
    peak_memory_mib: float = 0.0
    cell: str = ""
    finished: str = ""
    git_hash: str = ""
    code_digest: str = ""
    reused: bool = False


def train_once(
    context: TaskContext[KeepConfig], split: str, model: M, train: Callable[[], tuple[M, Training]]
) -> tuple[M, Training]:
    """Return the model trained on `split`: `train()`, unless an earlier cell has trained exactly that.

    The earlier cell's weights are then loaded into `model`. Either way they are kept in the job's folder if
    the config says so; parameters that are not trained are left out, since the backbone has them.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    shapes = {name: list(t.shape) for name, t in model.state_dict().items() if name not in frozen}
    key = compute_training_key(context, split, shapes)
    found = gather_over_ranks(_find_trained(context, key) if world().is_main else None)[0]
    if found is None:
        trained, training = train()
        training = _complete(context, training)
    else:
        trained, training = model, _read_training(found)
        trained.load_state_dict(trained.state_dict() | load_file(found / WEIGHTS_FILE))
    if context.config.keep_weights and world().is_main:
        with write_sealed(context.job.dir / TRAINED) as folder:
            if found:
                shutil.copytree(found, folder, copy_function=_link, dirs_exist_ok=True)
            else:
                weights = {name: t for name, t in trained.state_dict().items() if name in shapes}
                _write_trained(context, folder, weights, key, training)
    return trained, training


def compute_training_key(context: TaskContext[KeepConfig], split: str, shapes: dict[str, list[int]]) -> str:
    """Return the digest of all that decides a training: code, config, seed, backbone and the split's data.

    shapes: of the trained tensors by name.
    """
    config, layout = context.config, context.layout
    decisive = {
        "format": FORMAT,
        "version": kind(config.kind).version,
        "config": training_identity(type(config), config.model_dump(mode="json")),
        "data": layout.split_digests[split],
        "classes": list(layout.classes),
        "seed": context.job.seed,
        "shapes": shapes,
        "backbone": [context.report.digest, context.spec.to_dict()],
    }
    return json_digest(decisive)


def _find_trained(context: TaskContext[KeepConfig], key: str) -> Path | None:
    """Return the folder of an intact model that an earlier cell trained under this key, None if none is."""
    for cell in context.job.earlier:
        folder = cell / TRAINED
        if not folder.is_dir():
            continue
        try:
            if read_sealed_json(folder / TRAINING_FILE).get("key") == key:
                check_seal(folder)
                return folder
        except (BrokenSeal, FileNotFoundError) as error:
            reason = error.given if isinstance(error, BrokenSeal) else f"{folder} has no {TRAINING_FILE}"
            context.progress.note(f"{reason}; this model is not evaluated again")
    return None


def _read_training(folder: Path) -> Training:
    values = read_sealed_json(folder / TRAINING_FILE)
    return Training(**values["training"] | {"reused": True})


def _complete(context: TaskContext[KeepConfig], training: Training) -> Training:
    """Return a training that ended here with its origin filled in."""
    return replace(
        training,
        peak_memory_mib=peak_memory_mib(context.device),
        cell="/".join(context.job.dir.parts[-2:]),
        finished=now(),
        git_hash=git_hash(),
        code_digest=digest_kind(kind(context.config.kind)),
    )


def _write_trained(
    context: TaskContext[KeepConfig],
    folder: Path,
    weights: dict[str, torch.Tensor],
    key: str,
    training: Training,
) -> None:
    job, classes = context.job, list(context.layout.classes)
    provenance = {"config": job.config, "seed": job.seed, "classes": classes}
    on_cpu = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    write_safetensors(folder / WEIGHTS_FILE, on_cpu, context.spec, provenance)
    facts = {"key": key, "backbone_digest": context.report.digest, "training": asdict(training)}
    write_json(folder / TRAINING_FILE, seal_json(facts))


def _link(source: str, target: str) -> None:
    """Make `target` the same file, which takes no space, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def add_training(context: TaskContext[KeepConfig], outcome: Outcome, training: Training) -> Outcome:
    """Return the outcome of an evaluation with cost, kept weights and origin of the training."""
    cost: dict[str, Any] = {
        "seconds_train": training.seconds,
        "images_per_second": training.images_per_second,
        "peak_memory_mib": max(training.peak_memory_mib, outcome.cost["peak_memory_mib"]),
    }
    notes = [_describe_origin(context, training)] if training.reused else []
    files = {"trained": f"{TRAINED}/{WEIGHTS_FILE}"} if context.config.keep_weights else {}
    return replace(
        outcome,
        cost=outcome.cost | cost,
        notes=[*notes, *outcome.notes],
        artefacts=outcome.artefacts | files,
    )


def _describe_origin(context: TaskContext[KeepConfig], training: Training) -> str:
    commit = f" by commit {training.git_hash}" if training.git_hash else ""
    change = ""
    if training.code_digest != digest_kind(kind(context.config.kind)):
        change = f", but the code has changed since (digest {training.code_digest[:8] or 'unknown'})"
    return (
        f"evaluated the model that {training.cell} trained on {training.finished}{commit}: "
        f"what decides the training is the same{change}"
    )
