"""Where each field of a BackboneSpec comes from: the user, the file, its tensors, its family or an assumption."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from backbones.families import families, family, published_in
from backbones.reading.source import Checkpoint
from backbones.translating.infer import infer_shape_facts
from backbones.translating.translation import Translation
from mae_bench.spec import BackboneSpec

FEEDING = (
    "mean",
    "std",
    "interpolation",
    "global_pool",
    "norm_eps",
    "pos_resample",
)  # families.yaml has them, or its defaults
GIVEN, FILE, TENSORS = "given", "stated by the file", "told by the tensors"
UNNAMED = ("unknown", "none", "supervised")  # methods of many families


def find_origins(
    format: str,
    translation: Translation,
    checkpoint: Checkpoint,
    spec: BackboneSpec,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """A phrase for each field of the spec, in the order in which `backbones.translating.infer` prefers them."""
    name = find_family(format, translation.assumed)
    described = FILE if checkpoint.beside or checkpoint.stated_spec else TENSORS
    known = (
        dict.fromkeys(overrides or {}, GIVEN),
        dict.fromkeys(infer_shape_facts(translation.weights, checkpoint.source, vars(spec)), TENSORS),
        dict.fromkeys(translation.facts, described),
        dict.fromkeys(checkpoint.stated_spec, FILE),
        _of_family(name, translation.assumed),
        dict.fromkeys(("arch", "options", "pos_embed"), TENSORS),
        dict.fromkeys(translation.assumed, f"assumed for {format}"),
        {"num_heads": f"standard for a width of {spec.embed_dim}"},
        {key: f"family {name}: {published_in(name)}" for key in FEEDING if name},
    )
    return {
        f.name: next((of[f.name] for of in known if f.name in of), "assumed: the default")
        for f in fields(BackboneSpec)
    }


def _of_family(name: str, assumed: Mapping[str, Any]) -> dict[str, str]:
    stated = family(name) if name else {}
    return {
        key: f"family {name}: {published_in(name)}"
        for key, value in stated.items()
        if assumed.get(key) == value and value != "unknown"
    }


def find_family(format: str, assumed: Mapping[str, Any]) -> str:
    """The entry of families.yaml for a file of that format: by the format's name, else by its method; "" where none is known."""
    called = (format, format.removeprefix("hf_"), format.partition("_")[0])
    if found := next((name for name in called if name in families()), ""):
        return found
    method = str(assumed.get("pretrain_method", "unknown")).partition(",")[0]
    fitting = [
        name for name in families() if family(name).get("pretrain_method") == method and method not in UNNAMED
    ]
    return fitting[0] if len(fitting) == 1 else ""


def get_published(name: str) -> dict[str, Any]:
    """How a family's authors feed and pool, with the place that says so, JSON-ready; {} for no family."""
    if not name:
        return {}
    stated = family(name)
    default = {f.name: f.default for f in fields(BackboneSpec)}
    found = {key: stated.get(key, default[key]) for key in FEEDING} | {
        "family": name,
        "source": published_in(name),
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
