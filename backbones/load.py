"""One door for every checkpoint: `load_backbone(SOURCE)` gives a timm model, its BackboneSpec and a ConversionReport."""

from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from backbones.report import ConversionReport
from mae_bench.export import read_export
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec


def load_backbone(
    source: str | Path, *, global_pool: str | None = None, drop_path_rate: float = 0.0, dynamic_img_size: bool = False
) -> tuple[VisionTransformer, BackboneSpec, ConversionReport]:
    """Loads an exported folder. The model has no head; its `forward_features` gives prefix and patch tokens after the final norm."""
    weights, spec, digest, _ = read_export(source)
    model = build_vit(spec, drop_path_rate=drop_path_rate, dynamic_img_size=dynamic_img_size)
    model.load_state_dict(weights)
    return model, spec, ConversionReport(source=str(source), format="mae_bench", digest=digest, renamed={name: name for name in weights})
