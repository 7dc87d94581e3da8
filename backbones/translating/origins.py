"""Origin of each BackboneSpec field: the user, the file, its tensors, its family or an assumption."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from backbones.families import families, family, published_in
from backbones.reading.source import Checkpoint
from backbones.translating.grids import find_grids
from backbones.translating.infer import infer_shape_facts
from backbones.translating.translation import FILE, GIVEN, TENSORS, Translation
from mae_bench.spec import BackboneSpec

# Fields that families.yaml states or has a default for.
PREPROCESSING = ("mean", "std", "interpolation", "global_pool", "norm_eps", "pos_resample")
SHARED_METHODS = ("unknown", "none", "supervised")  # pretraining methods of many families


def find_origins(
    format: str,
    translation: Translation,
    checkpoint: Checkpoint,
    spec: BackboneSpec,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Return where each field of the spec comes from, in the order of preference of `infer_spec`."""
    name = find_family(format, translation.assumed)
    shapes = infer_shape_facts(translation.weights, checkpoint.source, vars(spec))
    if len(find_grids(translation.weights, vars(spec)) or ()) > 1:
        del shapes["img_size"]  # the tensors alone do not show it
    described = FILE if checkpoint.beside or checkpoint.stated_spec else TENSORS
    known = (
        dict.fromkeys(overrides or {}, GIVEN),
        translation.sources,
        dict.fromkeys(shapes, TENSORS),
        {key: FILE if key in PREPROCESSING else described for key in translation.facts},
        dict.fromkeys(checkpoint.stated_spec, FILE),
        _fields_of_family(name, translation.assumed),
        dict.fromkeys(("arch", "options", "pos_embed"), TENSORS),
        dict.fromkeys(translation.assumed, f"assumed for {format}"),
        {key: f"family {name}: {published_in(name)}" for key in PREPROCESSING if name},
    )
    return {
        f.name: next((origin[f.name] for origin in known if f.name in origin), "assumed: the default")
        for f in fields(BackboneSpec)
    }


def find_assumptions(
    format: str,
    translation: Translation,
    checkpoint: Checkpoint,
    spec: BackboneSpec,
    overrides: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the fields of the spec that neither the user, the file nor its tensors state, per source.

    For example "num_heads 6, norm_eps 1e-06: assumed for timm".
    """
    fields_of: dict[str, list[str]] = {}
    for name, origin in find_origins(format, translation, checkpoint, spec, overrides).items():
        if origin not in (GIVEN, FILE, TENSORS):
            fields_of.setdefault(origin, []).append(f"{name} {_format(getattr(spec, name))}")
    return [f"{', '.join(names)}: {origin}" for origin, names in fields_of.items()]


def _format(value: Any) -> str:
    return "(" + ", ".join(f"{item:g}" for item in value) + ")" if isinstance(value, tuple) else str(value)


def _fields_of_family(name: str, assumed: Mapping[str, Any]) -> dict[str, str]:
    stated = family(name) if name else {}
    return {
        key: f"family {name}: {published_in(name)}"
        for key, value in stated.items()
        if assumed.get(key) == value and value != "unknown"
    }


def find_family(format: str, assumed: Mapping[str, Any]) -> str:
    """Return the entry of families.yaml for a file of a format, "" if unknown.

    It is found by the format's name, else by the pretraining method.
    """
    for name in (format, format.removeprefix("hf_"), format.partition("_")[0]):
        if name in families():
            return name
    method = str(assumed.get("pretrain_method", "unknown")).partition(",")[0]
    if method in SHARED_METHODS:
        return ""
    matches = [name for name in families() if family(name).get("pretrain_method") == method]
    return matches[0] if len(matches) == 1 else ""


def get_published(name: str) -> dict[str, Any]:
    """Return a family's published preprocessing and pooling with their source; {} for no family."""
    if not name:
        return {}
    stated = family(name)
    defaults = {f.name: f.default for f in fields(BackboneSpec)}
    found = {key: stated.get(key, defaults[key]) for key in PREPROCESSING}
    found |= {"family": name, "source": published_in(name)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
