"""Find values in the arguments and configs that a training saved next to its weights."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

SECTIONS = ("model_kwargs", "model_args", "hyper_parameters", "args", "config", "cfg", "backbone", "kwargs")
MAX_DEPTH = 4  # nested sections of a file that are searched


def find_values(section: Any, names: tuple[str, ...], levels: int = MAX_DEPTH) -> Iterator[Any]:
    """Yield the values under any of `names` in a section and the sections inside it, outer ones first."""
    content = as_mapping(section)
    yield from (content[name] for name in names if name in content)
    for name in SECTIONS if levels else ():
        if name in content:
            yield from find_values(content[name], names, levels - 1)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a section as a mapping; {} for anything else than a mapping or a Namespace."""
    if isinstance(value, Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else {}
