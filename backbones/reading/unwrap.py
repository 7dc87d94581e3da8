"""Find the sets of ViT weights in a file by their patch embedding, under any wrappers and prefixes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from backbones.families import evaluates, families
from mae_bench.errors import UserError

# Names of the patch embedding's weight in the known layouts; what precedes one is the prefix of a ViT.
ANCHORS = (
    "patch_embed.proj.weight",  # timm and the research code derived from it
    "patch_embed.projection.weight",  # mmpretrain, mmsegmentation, transformers' SAM
    "embeddings.patch_embeddings.projection.weight",  # transformers' ViT, ViTMAE, BEiT, DINOv2, I-JEPA
    "embeddings.patch_embeddings.weight",  # transformers' DINOv3
    "embeddings.patch_embedding.weight",  # transformers' CLIP
    "conv1.weight",  # OpenAI's CLIP and OpenCLIP, if there is a class embedding
)
CLIP_MARK = "class_embedding"
# Added to names by torch.compile, FSDP and activation checkpointing.
INFIXES = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MAX_DEPTH = 3  # of nested dictionaries in a file
MAX_SETS = 32  # of ViT weights in a dictionary
MAX_NAME = 80  # characters of a name from a file that are shown
MIXED = "for files that differ in it, give `weights:` for each in a YAML list"


class SeveralSets(UserError):
    """A file holds several sets of ViT weights and none is selected; `labels` lists what `weights` takes."""

    def __init__(self, given: str, labels: list[str], *, expected: str, fix: str):
        super().__init__(given, expected=expected, fix=fix)
        self.labels = labels


def join_label(wrapper: str, prefix: str) -> str:
    """Return wrapper and prefix as one dotted name, "" if both are empty."""
    return ".".join(part.strip(".") for part in (wrapper, prefix) if part.strip("."))


@dataclass(frozen=True)
class Part:
    """One set of ViT weights.

    wrapper: the keys that lead to its dictionary, joined by dots. prefix: of its names in that dictionary.
    tensors: the ViT's, without the prefix. outside: the dictionary's other tensors, by their full names.
    extras: everything else in the dictionary and at the file's top level.
    """

    wrapper: str
    prefix: str
    tensors: dict[str, torch.Tensor]
    outside: dict[str, torch.Tensor]
    extras: dict[str, Any]

    @property
    def label(self) -> str:
        """What `--weights` takes: wrapper and prefix as one dotted name."""
        return join_label(self.wrapper, self.prefix)


def unwrap(content: Any, source: str, weights: str | None = None) -> Part:
    """Return the only set of ViT weights in `content`, or the one that `weights` selects by its label.

    Without any ViT, return the largest dictionary of tensors, so that later checks can say what it is. Raises
    SeveralSets if there are several and `weights` does not select one, UserError if there are no named
    tensors.
    """
    parts = list(_find_parts(content, source))
    if not parts:
        return _find_largest(content, source)
    selected = [part for part in parts if weights is None or _is_named(part, weights)]
    exact = [part for part in parts if part.label == weights]
    if len(selected) == 1 or len(exact) == 1:
        return (exact or selected)[0]
    if len(parts) == 1:
        raise UserError(
            f"{source} holds one set of ViT weights, named {_show(parts[0].label)}, not {weights!r}",
            fix=f"leave out --weights: it is not needed here; {MIXED}",
        )
    listed = ", ".join(_show(part.label) for part in parts)
    given = f"{source} holds {len(parts)} sets of ViT weights: {listed}"
    fix = _advise(parts)
    if weights is not None:
        given += f"; {weights!r} selects {len(selected) or 'none'} of them"
        fix += f"; {MIXED}"
    raise SeveralSets(given, [part.label for part in parts], expected="one of them", fix=fix)


def _show(label: str) -> str:
    return label[:MAX_NAME] or '"" (the top level)'


def _advise(parts: list[Part]) -> str:
    """Return how to select a set, and which of these sets the authors of a family evaluate."""
    authors: dict[str, list[str]] = {}
    for family in families():
        name = evaluates(family)
        if name and sum(_is_named(part, name) for part in parts) == 1:
            authors.setdefault(name, []).append(family)
    example = next(iter(authors), "") or _show((parts[-1].label or parts[0].label).split(".")[0])
    notes = [f"{name} is what the authors of {', '.join(who)} evaluate" for name, who in authors.items()]
    return "; ".join([f"select one with --weights NAME, for example --weights {example}", *notes])


def _is_named(part: Part, weights: str) -> bool:
    return weights == part.label or weights in part.label.split(".")


def _find_parts(content: Any, source: str) -> Iterator[Part]:
    for wrapper, named in _find_dictionaries(content):
        tensors = _select_tensors(named, source)
        prefixes = sorted(set(_find_prefixes(tensors)))
        if len(prefixes) > MAX_SETS:
            raise UserError(
                f"{source} holds {len(prefixes)} sets of ViT weights", expected=f"at most {MAX_SETS}"
            )
        extras = {str(key): value for key, value in named.items() if not isinstance(value, torch.Tensor)}
        if wrapper and isinstance(content, dict):
            top = wrapper.split(".")[0]
            extras |= {str(key): value for key, value in content.items() if key != top}
        for prefix in prefixes:
            # A ViT under a longer prefix is another set, also if it lies inside this one.
            others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
            inside = {name for name in tensors if name.startswith(prefix) and not name.startswith(others)}
            yield Part(
                wrapper,
                prefix,
                {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name in inside},
                {name: tensor for name, tensor in tensors.items() if name not in inside},
                dict(extras),
            )


def _select_tensors(named: Mapping[str, Any], source: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a dictionary, without the infixes of wrapped modules in their names."""
    result: dict[str, torch.Tensor] = {}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            continue
        plain = INFIXES.sub("", name)
        if plain in result:
            raise UserError(
                f"{source} holds {plain[:MAX_NAME]} twice, wrapped and unwrapped",
                expected="each tensor once",
            )
        result[plain] = value
    return result


def _find_prefixes(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name in tensors:
        for anchor in ANCHORS:
            prefix = name.removesuffix(anchor)
            if prefix == name or (prefix and not prefix.endswith(".")):
                continue
            if anchor != "conv1.weight" or prefix + CLIP_MARK in tensors:
                yield prefix


def _find_dictionaries(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every dictionary with string keys and tensors once, with the keys that lead to it."""
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
        for key, item in reversed(named.items()):
            waiting.append((f"{wrapper}.{key}" if wrapper else key, item, depth + 1))


def _find_largest(content: Any, source: str) -> Part:
    candidates = sorted(_find_dictionaries(content), key=lambda item: -len(item[1]))
    if candidates:
        wrapper, named = candidates[0]
        return Part(wrapper, "", _select_tensors(named, source), {}, {})
    held: Any = type(content).__name__
    if isinstance(content, dict):
        held = sorted(str(key)[:MAX_NAME] for key in content)[:10]
    raise UserError(
        f"{source} holds {held or 'nothing'}",
        expected="named tensors",
        fix="save the model's state_dict",
    )
