"""What a model costs: parameters, multiply-adds, memory."""

import resource

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec


def num_params(model: nn.Module) -> int:
    """Parameters, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def backbone_gmacs(spec: BackboneSpec, img_size: tuple[int, int] | None = None) -> float:
    """Multiply-adds of one image's forward pass in 10^9, counted by torch on the meta device (a fused attention is counted
    too)."""
    with torch.device("meta"):
        model: VisionTransformer = build_vit(spec, dynamic_img_size=img_size is not None)
        imgs = torch.empty(1, spec.in_chans, *(img_size or spec.img_size))
    with FlopCounterMode(display=False) as counter:
        model.forward_features(imgs)
    return counter.get_total_flops() / 2e9


def peak_memory_mib(device: torch.device) -> float:
    """Peak of this process so far: device memory on a GPU, resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB
