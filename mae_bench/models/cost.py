"""Cost of a model: parameters, multiply-adds, memory."""

import resource

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mae_bench.models.mae import MAE
from mae_bench.models.masking import build_masking
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec


def num_params(model: nn.Module) -> int:
    """Return the number of parameters, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def backbone_gmacs(spec: BackboneSpec, img_size: tuple[int, int] | None = None) -> float:
    """Return the multiply-adds of one image's forward pass, in 10^9.

    Counted by torch on the meta device, fused attention included.
    """
    with torch.device("meta"):
        model: VisionTransformer = build_vit(spec, dynamic_img_size=img_size is not None)
        imgs = torch.empty(1, spec.in_chans, *(img_size or spec.img_size))
    with FlopCounterMode(display=False) as counter:
        model.forward_features(imgs)
    flops: int = counter.get_total_flops()
    return flops / 2e9


def training_flops(model: MAE, mask_ratio: float) -> float:
    """Return the floating-point operations of one image's forward and backward pass in pretraining.

    Three times the products of the forward pass. Operations repeated by activation checkpointing are not
    counted, as usual for MFU (arXiv 2204.02311, appendix B).
    """
    with torch.device("meta"):
        shape = MAE(model.spec, model.options).train()
        imgs = torch.empty(1, model.spec.in_chans, *model.spec.img_size)
        noise = torch.empty(1, model.spec.num_patches)
    masking = build_masking(noise, mask_ratio)
    with FlopCounterMode(display=False) as counter:
        latent = shape.encode(shape.split_patches(imgs), masking)
        shape.decode(latent, masking, scored_only=True)
    flops: int = counter.get_total_flops()
    return 3.0 * flops


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process so far: device memory on a GPU, resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB
