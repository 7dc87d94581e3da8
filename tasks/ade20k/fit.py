"""Check that UperNet fits a backbone's patches; imports no framework, so that `plan` can call it."""

from backbones.adapters.pyramid import get_patch_side
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec
from tasks.ade20k.config import UPerNetConfig


def fit(config: UPerNetConfig, spec: BackboneSpec, *, arrays: bool = False) -> UPerNetConfig:
    """Return the config; raise UserError for oblong patches, and for a crop that they do not divide."""
    patch = get_patch_side(spec, "mmsegmentation")
    if config.crop_size % patch:
        raise UserError(
            f"crop_size {config.crop_size} with a patch of {patch}",
            expected="a multiple of the patch",
            fix=f"set tasks.NAME.crop_size={-(-config.crop_size // patch) * patch}",
        )
    return config
