"""The files in which a drawn model is stored: how each family's training saves it, and how others wrap, split
and convert it.

A state dict here has the names of the module that the training script saves (a golden file's `tensors`).
`other` is a second set of weights with the same names, for the parts of a file that hold another model
(student, momentum encoder, averages).
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

State = dict[str, torch.Tensor]
File = Callable[[State, State], Any]
OPTIMIZER = {
    "state": {0: {"step": 3, "exp_avg": torch.zeros(3)}},
    "param_groups": [{"lr": 1e-3, "params": [0]}],
}
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
NOT_BACKBONE = re.compile(r"decoder|mask_token|masked_embed|head\.|predictor|lm_head|wfm\.|dec_norms")


@dataclass(frozen=True)
class Layout:
    """How a file is made from (state, other), and what a user says to load it."""

    build: File
    options: Mapping[str, Any] = field(default_factory=dict)


def prefix(text: str, state: State) -> State:
    return {text + name: tensor for name, tensor in state.items()}


def take(text: str, state: State) -> State:
    """Return the tensors below a prefix, without it."""
    return {name[len(text) :]: tensor for name, tensor in state.items() if name.startswith(text)}


def take_backbone(vit: str, state: State) -> State:
    """Return the ViT alone: without heads, decoders and mask tokens."""
    return {name: t for name, t in take(vit, state).items() if not NOT_BACKBONE.match(name)}


def make_args(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(output_dir="", resume="", gpu=0, **values)


# How each family's own scripts save


def save_mae(state: State, other: State) -> dict[str, Any]:
    """util/misc.py (save_model)."""
    args = make_args(model="mae_vit_toy", blr=1.5e-4, norm_pix_loss=True)
    return {"model": state, "optimizer": OPTIMIZER, "epoch": 7, "scaler": SCALER, "args": args}


def save_mae_lite(state: State, other: State) -> dict[str, Any]:
    """mae_lite/tools/train.py; the experiment's Model keeps the network as `model`, and DDP wraps it."""
    rest = {
        "start_epoch": 400,
        "optimizer": OPTIMIZER,
        "scheduler": {"last_epoch": 3},
        "best_top1": 0.0,
        "best_top1_epoch": 0,
    }
    return {"model": prefix("module.model.", state), **rest, "best_top5": 0.0, "scaler": SCALER}


def save_dino(state: State, other: State) -> dict[str, Any]:
    """main_dino.py and main_ibot.py: the student is wrapped for DDP, the teacher of a ViT is not."""
    groups = [{"lr": np.float64(5e-4), "weight_decay": np.float64(0.04), "params": [0]}]
    return {
        "student": prefix("module.", other),
        "teacher": state,
        "optimizer": {"state": {}, "param_groups": groups},
        "epoch": 100,
        "args": make_args(arch="vit_toy", patch_size=16, out_dim=24),
        "dino_loss": {"center": torch.zeros(1, 24)},
        "fp16_scaler": SCALER,
    }


def save_ibot(state: State, other: State) -> dict[str, Any]:
    content = save_dino(state, other)
    del content["dino_loss"]
    return {**content, "ibot_loss": {"center": torch.zeros(1, 24), "center2": torch.zeros(1, 1, 24)}}


def save_dinov2(state: State, other: State) -> dict[str, Any]:
    """The training's state of fvcore's checkpointer."""
    return {
        "model": prefix("student.", other) | prefix("teacher.", state),
        "optimizer": OPTIMIZER,
        "iteration": 9,
    }


def save_moco(state: State, other: State) -> dict[str, Any]:
    """main_moco.py; main_lincls.py adds best_acc1."""
    return {
        "epoch": 300,
        "arch": "vit_toy",
        "state_dict": prefix("module.", state),
        "optimizer": OPTIMIZER,
        "scaler": SCALER,
    }


def save_moco_swapped(state: State, other: State) -> dict[str, Any]:
    """The state's base encoder is the file's momentum encoder."""
    momentum = prefix("momentum_encoder.", take("base_encoder.", state))
    return save_moco(
        prefix("base_encoder.", take("base_encoder.", other))
        | momentum
        | prefix("predictor.", take("predictor.", state)),
        other,
    )


def save_deit(state: State, other: State) -> dict[str, Any]:
    """main.py."""
    rest = {"optimizer": OPTIMIZER, "lr_scheduler": {"base_values": [5e-4]}, "epoch": 299, "scaler": SCALER}
    return {
        "model": other,
        **rest,
        "model_ema": state,
        "args": make_args(model="deit_toy", distillation_type="none"),
    }


def save_ijepa(state: State, other: State) -> dict[str, Any]:
    """src/train.py: the three networks are wrapped for DDP."""
    return {
        "encoder": prefix("module.", take("target_encoder.", other)),
        "predictor": prefix("module.", take("predictor.", state)),
        "target_encoder": prefix("module.", take("target_encoder.", state)),
        "opt": OPTIMIZER,
        "scaler": None,
        "epoch": 300,
        "loss": 0.1,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }


def save_beit(state: State, other: State) -> dict[str, Any]:
    """utils.py (save_model)."""
    args = make_args(model="beit_toy", imagenet_default_mean_and_std=False, rel_pos_bias=True)
    return {"model": state, "optimizer": OPTIMIZER, "epoch": 799, "scaler": SCALER, "args": args}


def save_simmim(state: State, other: State) -> dict[str, Any]:
    """utils.py (save_checkpoint), without its yacs config."""
    rest = {
        "optimizer": OPTIMIZER,
        "lr_scheduler": {"base_values": [1e-4]},
        "max_accuracy": 0.0,
        "epoch": 799,
    }
    return {"model": state, **rest, "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 0}}}


def save_timm(state: State, other: State) -> dict[str, Any]:
    """train.py of timm (utils/checkpoint_saver.py)."""
    args = make_args(model="vit_small_patch16_224")
    return {
        "epoch": 9,
        "arch": "vit_small_patch16_224",
        "state_dict": state,
        "optimizer": OPTIMIZER,
        "version": 2,
        "args": args,
    }


RELEASED = Layout(lambda state, other: {"model": state})
BARE = Layout(lambda state, other: state)
AVERAGED = Layout(lambda state, other: {"model": other, "model_ema": state}, {"weights": "model_ema"})

# Family -> its files; the first one is that of every model, the others are tried with the base model.
LAYOUTS: dict[str, dict[str, Layout]] = {
    "mae": {
        "checkpoint": Layout(save_mae),
        "released": RELEASED,
        "encoder": Layout(lambda state, other: {"model": take_backbone("", state)}),
        "averaged": AVERAGED,
    },
    "mae_lite": {
        "checkpoint": Layout(save_mae_lite),
        "released": RELEASED,
        "unwrapped": Layout(lambda state, other: {"model": prefix("model.", state)}),
        "averaged": AVERAGED,
    },
    "crossmae": {"checkpoint": Layout(save_mae), "released": RELEASED, "averaged": AVERAGED},
    "dino": {
        "checkpoint": Layout(save_dino, {"weights": "teacher"}),
        "student": Layout(lambda state, other: save_dino(other, state), {"weights": "student"}),
        "teacher": BARE,
        "under-teacher": Layout(lambda state, other: {"teacher": state}),
    },
    "ibot": {
        "checkpoint": Layout(save_ibot, {"weights": "teacher"}),
        "student": Layout(lambda state, other: save_ibot(other, state), {"weights": "student"}),
        "teacher": BARE,
        "extracted": Layout(
            lambda state, other: {"state_dict": take("backbone.", state)}, {"format": "ibot"}
        ),
    },
    "dinov2": {
        "released": Layout(lambda state, other: take("backbone.", state)),
        "training": Layout(save_dinov2, {"weights": "teacher"}),
        "student": Layout(lambda state, other: save_dinov2(other, state), {"weights": "student"}),
        "teacher": Layout(lambda state, other: {"teacher": state}),
        "bare-teacher": BARE,
    },
    "moco_v3": {
        "checkpoint": Layout(save_moco, {"weights": "base_encoder"}),
        "momentum": Layout(save_moco_swapped, {"weights": "momentum_encoder"}),
        "probe": Layout(lambda state, other: {**save_moco(state, other), "best_acc1": torch.tensor(76.7)}),
        "for-deit": Layout(lambda state, other: {"model": take_backbone("base_encoder.", state)}),
    },
    "deit": {
        "released": Layout(lambda state, other: {"model": state}, {"format": "deit"}),
        "averages": Layout(save_deit, {"weights": "model_ema"}),
        "training": Layout(lambda state, other: save_deit(other, state), {"weights": "model"}),
    },
    "deit3": {
        "released": Layout(lambda state, other: {"model": state}, {"format": "deit3"}),
        "averages": Layout(save_deit, {"weights": "model_ema", "format": "deit3"}),
        "training": Layout(
            lambda state, other: save_deit(other, state), {"weights": "model", "format": "deit3"}
        ),
    },
    "ijepa": {
        "checkpoint": Layout(save_ijepa, {"weights": "target_encoder"}),
        "target": Layout(
            lambda state, other: {"target_encoder": prefix("module.", take("target_encoder.", state))},
            {"format": "ijepa"},
        ),
    },
    "beit": {
        "checkpoint": Layout(save_beit, {"format": "beit"}),
        "released": Layout(lambda state, other: {"model": state}, {"format": "beit"}),
        "deepspeed": Layout(lambda state, other: {"module": state, "epoch": 3}, {"format": "beit"}),
        "averaged": Layout(
            lambda state, other: {"model": other, "model_ema": state},
            {"format": "beit", "weights": "model_ema"},
        ),
    },
    "simmim": {
        "checkpoint": Layout(save_simmim),
        "released": Layout(lambda state, other: {"model": state}, {"format": "simmim"}),
        "averaged": Layout(
            lambda state, other: {"model": other, "model_ema": state},
            {"format": "simmim", "weights": "model_ema"},
        ),
    },
    "timm_032": {"checkpoint": Layout(save_timm), "released": BARE},
}


# What trainers and wrappers do to names and tensors


def wrap_each(infix: str) -> Callable[[State], State]:
    """Return the renaming that a wrapper of each block makes."""
    return lambda state: {re.sub(r"(blocks\.\d+)\.", rf"\1.{infix}.", name): t for name, t in state.items()}


def cast(dtype: torch.dtype) -> Callable[[State], State]:
    return lambda state: {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def share_storage(state: State) -> State:
    """Return views of one flat buffer, as flattened parameters are saved."""
    floating = {name: t for name, t in state.items() if t.is_floating_point()}
    flat = torch.cat([t.reshape(-1) for t in floating.values()])
    parts = flat.split([t.numel() for t in floating.values()])
    return state | {name: part.view(t.shape) for (name, t), part in zip(floating.items(), parts, strict=True)}


def transpose_storage(state: State) -> State:
    """Return matrices whose memory is column-major."""
    return {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in state.items()}


WRAPS: dict[str, Callable[[State], State]] = {
    "ddp": lambda state: prefix("module.", state),
    "compiled": lambda state: prefix("_orig_mod.", state),
    "ddp-compiled": lambda state: prefix("module._orig_mod.", state),
    "compiled-ddp": lambda state: prefix("_orig_mod.module.", state),
    "fsdp": lambda state: prefix("_fsdp_wrapped_module.", wrap_each("_fsdp_wrapped_module")(state)),
    "fsdp-blocks": wrap_each("_fsdp_wrapped_module"),
    "checkpointed-blocks": wrap_each("_checkpoint_wrapped_module"),
    "compiled-blocks": wrap_each("_orig_mod"),
    "fsdp-checkpointed": wrap_each("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "float16": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "float64": cast(torch.float64),
    "parameters": lambda state: {n: nn.Parameter(t, t.is_floating_point()) for n, t in state.items()},
    "reversed": lambda state: dict(reversed(state.items())),
    "views": share_storage,
    "transposed": transpose_storage,
}


def wrap(name: str, state: State, parts: tuple[str, ...]) -> State:
    """Return the state after a change of `WRAPS`, made to each part of the module by itself."""
    return {part + key: t for part in parts for key, t in WRAPS[name](take(part, state)).items()}


# Other containers of the ViT alone, which bear no mark of the family: the user names the format


def write_shards(folder: Path, state: State, *, safe: bool) -> Path:
    """Write two shards and their index; return the index."""
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    names = list(state)
    parts = {1: names[::2], 2: names[1::2]}
    placed: dict[str, str] = {}
    for number, part in parts.items():
        file = folder / f"{stem}-{number:05}-of-00002.{suffix}"
        content = {name: state[name].contiguous() for name in part}
        save_file(content, file) if safe else torch.save(content, file)
        placed |= dict.fromkeys(part, file.name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return index


def write_safetensors(folder: Path, state: State) -> Path:
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "backbone.safetensors")
    return folder / "backbone.safetensors"


def write_pickle(folder: Path, content: Any, name: str = "checkpoint.pth", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


CONTAINERS: dict[str, Callable[[Path, State], Path]] = {
    "bare": write_pickle,
    "bare-legacy": lambda folder, state: write_pickle(
        folder, state, "old.pth.tar", _use_new_zipfile_serialization=False
    ),
    "bare-safetensors": write_safetensors,
    "bare-safetensors-half": lambda folder, state: write_safetensors(folder, cast(torch.float16)(state)),
    "bare-shards": lambda folder, state: write_shards(folder, state, safe=True),
    "bare-bin-shards": lambda folder, state: write_shards(folder, state, safe=False),
    "bare-under-state-dict": lambda folder, state: write_pickle(folder, {"state_dict": state, "epoch": 3}),
    "bare-under-model": lambda folder, state: write_pickle(folder, {"model": state}),
    "bare-lightning": lambda folder, state: write_pickle(
        folder,
        {"state_dict": prefix("model.", state), "pytorch-lightning_version": "2.5.0", "epoch": 3},
        "last.ckpt",
    ),
    "bare-in-backbone": lambda folder, state: write_pickle(folder, prefix("backbone.", state), "model.bin"),
}


def drop_block(state: State, number: int) -> State:
    """Return the state without one block of the encoder."""
    return {
        name: t
        for name, t in state.items()
        if not re.search(rf"(?<!decoder_)(?<!predictor_)blocks\.{number}\.", name)
    }
