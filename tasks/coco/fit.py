"""Check that Mask R-CNN's pyramid fits a backbone; imports no framework, so that `plan` can call it."""

from backbones.adapters.pyramid import get_pyramid_scales
from mae_bench.spec import BackboneSpec
from tasks.coco.config import MaskRCNNConfig


def fit(config: MaskRCNNConfig, spec: BackboneSpec, *, arrays: bool = False) -> MaskRCNNConfig:
    """Return the config; raise UserError if its strides cannot be made from the backbone's patches."""
    get_pyramid_scales(spec, config.pyramid_strides)
    return config
