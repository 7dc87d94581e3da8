"""Toy files of facebookresearch/moco-v3 (main_moco.py, builder.py, main_lincls.py, convert_to_deit.py)."""

from pathlib import Path

import torch

from tests.backbones.formats.plain_vit import PATCH, SIZE, WIDTH, encoder_shapes, linear, norm, sincos
from tests.backbones.formats.reference import Files, Shapes, fill, prefixed


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    table = sincos(WIDTH, SIZE // PATCH, down_first=True, class_row=True)
    return {**fill(encoder_shapes(), seed), "pos_embed": table}


def mlp(sizes: list[int]) -> dict[str, torch.Tensor]:
    """Return linear layers without bias, each with a batch norm; the last norm has no affine parameters."""
    shapes: Shapes = {}
    count = len(sizes) - 1
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        shapes[f"{3 * i}.weight"] = (outputs, inputs)
        shapes |= norm(f"{3 * i + 1}", outputs) if i < count - 1 else {}
        shapes |= {f"{3 * i + 1}.running_mean": (outputs,), f"{3 * i + 1}.running_var": (outputs,)}
    counts = {f"{3 * i + 1}.num_batches_tracked": torch.tensor(9) for i in range(count)}
    return fill(shapes, 3) | counts


def write(folder: Path) -> Files:
    head = prefixed("head.", mlp([WIDTH, 16, 16, 8]))
    encoders = prefixed("base_encoder.", weights() | head) | prefixed("momentum_encoder.", weights(1) | head)
    state = prefixed("module.", encoders | prefixed("predictor.", mlp([8, 16, 8])))
    rest = {"epoch": 300, "arch": "vit_tiny", "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save({"state_dict": state, **rest, "scaler": {"scale": 65536.0}}, folder / "vit-300ep.pth.tar")
    probe = prefixed("module.", weights() | fill(linear("head", WIDTH, 10)))
    torch.save(
        {"state_dict": probe, **rest, "best_acc1": torch.tensor(76.7)}, folder / "linear-vit-300ep.pth.tar"
    )
    torch.save({"model": weights()}, folder / "for-deit.pth")
    return {
        "base": (folder / "vit-300ep.pth.tar", {"weights": "base_encoder"}),
        "momentum": (folder / "vit-300ep.pth.tar", {"weights": "momentum_encoder"}),
        "probe": (folder / "linear-vit-300ep.pth.tar", {}),
        "for-deit": (folder / "for-deit.pth", {}),
    }
