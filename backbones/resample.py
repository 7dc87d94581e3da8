"""Takes a translated backbone to another image or patch size: position tables, relative tables, patch embedding."""

from backbones.translation import Translation
from mae_bench.spec import BackboneSpec


def resample(
    translation: Translation, spec: BackboneSpec, img_size: tuple[int, int] | None, patch_size: tuple[int, int] | None
) -> BackboneSpec:
    """Resamples `translation.weights` in place and returns the spec at the new sizes, (height, width) in pixels."""
    if (img_size or spec.img_size) == spec.img_size and (patch_size or spec.patch_size) == spec.patch_size:
        return spec
    raise NotImplementedError
