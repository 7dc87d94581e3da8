"""Finds the sets of ViT weights in what a file holds: by where a patch embedding lies, under whatever wrappers and prefixes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from backbones.families import evaluates, families
from mae_bench.errors import UserError

# Names of the patch embedding's weight in the layouts that are read; what stands before one is the prefix of a ViT.
ANCHORS = (
    "patch_embed.proj.weight",  # timm and the research code that grew from it
    "patch_embed.projection.weight",  # mmpretrain, mmsegmentation, transformers' SAM
    "embeddings.patch_embeddings.projection.weight",  # transformers' ViT, ViTMAE, BEiT, DINOv2, I-JEPA
    "embeddings.patch_embeddings.weight",  # transformers' DINOv3
    "embeddings.patch_embedding.weight",  # transformers' CLIP
    "conv1.weight",  # OpenAI's CLIP and OpenCLIP, beside a class embedding
)
CLIP_MARK = "class_embedding"
INFIXES = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)  # torch.compile, FSDP, checkpointing
MAX_DEPTH = 3  # of dictionaries in a file
MAX_SETS = 32  # of ViT weights in a dictionary
MIXED = "to evaluate files that differ in it, a YAML list has `weights:` for each"
SHOWN = 80  # characters of a name that a file brings


class SeveralSets(UserError):
    """A file holds several sets of ViT weights and nothing says which; `labels` are what `weights` may be."""

    def __init__(self, given: str, labels: list[str], *, expected: str, fix: str):
        super().__init__(given, expected=expected, fix=fix)
        self.labels = labels


@dataclass(frozen=True)
class Part:
    """One set of ViT weights. wrapper: the keys down to its dictionary, joined by dots. prefix: of its names there."""

    wrapper: str
    prefix: str
    tensors: dict[str, torch.Tensor]  # without prefix
    outside: dict[str, torch.Tensor]  # the same dictionary's other tensors, whole names
    extras: dict[str, Any]  # what else stands in the file's top level or in the dictionary

    @property
    def label(self) -> str:
        """Wrapper and prefix as one dotted name; "" where both are empty."""
        return ".".join(part.strip(".") for part in (self.wrapper, self.prefix) if part.strip("."))


def unwrap(content: Any, source: str, weights: str | None = None) -> Part:
    """The one set of ViT weights in `content`, or that of which `weights` names a component of the label (teacher, model_ema).

    A file without any gives its largest dictionary of tensors, for whoever tells what is wrong with it. UserError where several
    sets are in the file and `weights` does not decide, and where there are no named tensors at all.
    """
    found = list(_parts(content, source))
    if not found:
        return _fallback(content, source)
    fitting = [part for part in found if weights is None or _names(part, weights)]
    exact = [part for part in found if part.label == weights]
    if len(fitting) == 1 or len(exact) == 1:
        return (exact or fitting)[0]
    if len(found) == 1:
        raise UserError(
            f"{source} holds one set of ViT weights, called {_shown(found[0].label)}, which {weights!r} does not name",
            fix=f"leave out --weights: it is not needed here; {MIXED}",
        )
    listed = ", ".join(_shown(part.label) for part in found)
    named = f"; {weights!r} names {len(fitting) or 'none'} of them" if weights is not None else ""
    raise SeveralSets(
        f"{source} holds {len(found)} sets of ViT weights: {listed}{named}",
        [part.label for part in found],
        expected="one of them",
        fix=_advice(found) + (f"; {MIXED}" if named else ""),
    )


def _shown(label: str) -> str:
    return label[:SHOWN] or '"" (the top level)'


def _advice(found: list[Part]) -> str:
    """What to say, and which of these sets the authors of a family evaluate."""
    authors: dict[str, list[str]] = {}
    for family in families():
        if (name := evaluates(family)) and sum(_names(part, name) for part in found) == 1:
            authors.setdefault(name, []).append(family)
    example = next(iter(authors), "") or _shown((found[-1].label or found[0].label).split(".")[0])
    told = [f"{name} is what the authors of {', '.join(who)} evaluate" for name, who in authors.items()]
    return "; ".join([f"say which with --weights NAME, for example --weights {example}", *told])


def _names(part: Part, weights: str) -> bool:
    return weights == part.label or weights in part.label.split(".")


def _parts(content: Any, source: str) -> Iterator[Part]:
    for wrapper, named in _dictionaries(content):
        tensors = _tensors(named, source)
        prefixes = sorted(set(_prefixes(tensors)))
        if len(prefixes) > MAX_SETS:
            raise UserError(
                f"{source} holds {len(prefixes)} sets of ViT weights", expected=f"at most {MAX_SETS}"
            )
        for prefix in prefixes:
            others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
            inside = {name for name in tensors if name.startswith(prefix) and not name.startswith(others)}
            extras = {str(key): value for key, value in named.items() if not isinstance(value, torch.Tensor)}
            if wrapper and isinstance(content, dict):
                top = wrapper.split(".")[0]
                extras |= {str(key): value for key, value in content.items() if key != top}
            yield Part(
                wrapper,
                prefix,
                {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name in inside},
                {name: tensor for name, tensor in tensors.items() if name not in inside},
                extras,
            )


def _tensors(named: Mapping[str, Any], source: str) -> dict[str, torch.Tensor]:
    """The tensors of a dictionary without the infixes of wrapped modules."""
    result: dict[str, torch.Tensor] = {}
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            plain = INFIXES.sub("", name)
            if plain in result:
                raise UserError(
                    f"{source} holds {plain[:SHOWN]} twice, wrapped and unwrapped",
                    expected="each tensor once",
                )
            result[plain] = value
    return result


def _prefixes(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name in tensors:
        for anchor in ANCHORS:
            before = name.removesuffix(anchor)
            if before == name or (before and not before.endswith(".")):
                continue
            if anchor != "conv1.weight" or before + CLIP_MARK in tensors:
                yield before


def _dictionaries(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary with string keys and tensors in it, with the keys that lead to it; once, by however many ways."""
    seen: set[int] = set()
    waiting = [("", content, 0)]
    while waiting:
        wrapper, value, depth = waiting.pop()
        if not isinstance(value, dict) or depth > MAX_DEPTH or id(value) in seen:
            continue
        seen.add(id(value))
        named = {key: item for key, item in value.items() if isinstance(key, str)}
        if any(isinstance(item, torch.Tensor) for item in named.values()):
            yield wrapper, named
        waiting += [
            (f"{wrapper}.{key}" if wrapper else key, item, depth + 1) for key, item in reversed(named.items())
        ]


def _fallback(content: Any, source: str) -> Part:
    candidates = sorted(_dictionaries(content), key=lambda item: -len(item[1]))
    if not candidates:
        names = (
            sorted(str(key)[:SHOWN] for key in content)[:10]
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise UserError(
            f"{source} holds {names or 'nothing'}",
            expected="named tensors",
            fix="save the model's state_dict",
        )
    wrapper, named = candidates[0]
    return Part(wrapper, "", _tensors(named, source), {}, {})
