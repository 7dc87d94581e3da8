"""Layer by layer, how far a loaded backbone is from another implementation of it on the same images."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from backbones.load import load_backbone
from backbones.preprocessing import a_sample
from backbones.user_code import callable_named, run_theirs
from mae_bench.data.batches.transforms import eval_transform, normalize
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec
from mae_bench.suite.config import source_path

TOLERANCE = 1e-5  # of the features' scale: what the order of float32 sums moves, and no mistake hides in
OURS, THEIRS = "ours", "theirs"


@dataclass(frozen=True)
class Difference:
    """Of one layer's tokens: the largest absolute difference, and the largest absolute value of ours, its scale."""

    layer: str
    absolute: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference by the scale; infinite where a value is not finite."""
        found = self.absolute / self.scale if self.scale else self.absolute
        return found if math.isfinite(found) else math.inf


@dataclass(frozen=True)
class Parity:
    """Differences in the order of the layers: embedding, blocks, final tokens. notes: what could not be compared, and why."""

    layers: list[Difference]
    tolerance: float = TOLERANCE
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Difference:
        return max(self.layers, key=lambda layer: layer.relative)

    @property
    def first(self) -> Difference | None:
        """The first layer beyond the tolerance."""
        return next((layer for layer in self.layers if not layer.relative <= self.tolerance), None)

    @property
    def equal(self) -> bool:
        """Whether every layer is within the tolerance."""
        return self.first is None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a difference that is not finite is null."""
        rows = [asdict(layer) | {"relative": layer.relative} for layer in self.layers]
        finite = [
            {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
            for row in rows
        ]
        return {"equal": self.equal, "tolerance": self.tolerance, "layers": finite, "notes": self.notes}


def verify(
    source: str | Path,
    against: str,
    *,
    images: str | Path | None = None,
    count: int = 2,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    **options: Any,
) -> Parity:
    """Loads `source` (options: of `load_backbone`) and what MODULE:CALLABLE gives, and compares them in float32 on the CPU.

    The callable is the user's own code, and is run. `count` images: random ones drawn from `seed`, or the first below `images`.
    UserError for a callable that cannot be had, and for a model that is of another shape.
    """
    callable_named(against)  # before anything is read
    ours, spec, _ = load_backbone(source, **options)
    theirs = other_model(against, source)
    return compare(ours, theirs, some_images(spec, images, count, seed), tolerance)


def other_model(against: str, source: str | Path) -> nn.Module:
    """What MODULE:CALLABLE returns, in float32; it is called with `source` if it takes an argument that has no default."""
    make = callable_named(against)
    path = source_path(str(source)) or source
    model = run_theirs(f"{against} fails", make, *([str(path)] if _wants_path(make) else []))
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{against} returns an object of the type {type(model).__name__}", expected="a torch.nn.Module"
        )
    return model.float().eval()


def _wants_path(make: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        return any(
            p.kind in kinds and p.default is p.empty for p in inspect.signature(make).parameters.values()
        )
    except (TypeError, ValueError):  # of a callable that is written in C
        return False


def some_images(spec: BackboneSpec, folder: str | Path | None, count: int, seed: int) -> torch.Tensor:
    """(count, C, H, W), normalised as the spec says: random ones, or some of a folder's images."""
    if folder is None:
        return torch.randn(
            count, spec.in_chans, *spec.img_size, generator=torch.Generator().manual_seed(seed)
        )
    imgs, _ = a_sample(folder, count, seed).view(
        eval_transform(spec.img_size, interpolation=spec.interpolation)
    )
    return normalize(imgs, spec.mean, spec.std)


def compare(ours: nn.Module, theirs: nn.Module, imgs: torch.Tensor, tolerance: float = TOLERANCE) -> Parity:
    """The largest difference a layer between a timm ViT and another torch module on imgs (N, C, H, W); both are set to eval().

    Their blocks are the first ModuleList or Sequential of as many members as ours has, whose outputs have the shapes of ours;
    outputs may be tensors, tuples, dictionaries or transformers' ModelOutputs, and have patches as a sequence or as a map.
    Their final tokens are looked for in what `forward_features` gives, else `forward`.
    UserError where there are no such blocks, and where their forward fails.
    """
    vit: Any = ours.eval()
    blocks = list(vit.blocks)
    mine, final = _run(vit.forward_features, {OURS: blocks}, imgs)
    theirs.eval()
    candidates = {
        name: list(module.children())
        for name, module in theirs.named_modules()
        if _is_stack(module, len(blocks))
    }
    if not candidates:
        raise _other_depth(theirs, len(blocks))
    call = getattr(theirs, "forward_features", theirs)
    found, output = run_theirs(
        f"their forward fails on images {tuple(imgs.shape)}", _run, call, candidates, imgs
    )
    want = mine[OURS]
    fitting = [stack for stack in found.values() if len(stack) == len(want) and _fit(stack, want)]
    if not fitting:
        raise _other_shapes(found, want)
    names = ["embedding", *(f"block {i}" for i in range(len(blocks)))]
    layers = [_difference(name, a, _like(b, a)) for name, a, b in zip(names, want, fitting[0], strict=True)]
    last = _final(final, output, int(getattr(vit, "num_prefix_tokens", 0)))
    notes = (
        []
        if last
        else ["final tokens: nothing in their output has the shape of ours; the blocks alone were compared"]
    )
    return Parity([*layers, *last], tolerance, notes)


def _is_stack(module: nn.Module, depth: int) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == depth


@torch.no_grad()
def _run(
    call: Callable[..., Any], stacks: Mapping[str, Sequence[nn.Module]], imgs: torch.Tensor
) -> tuple[dict[str, list[Any]], Any]:
    """What goes into the first member of each stack and what comes out of each member, and the output; seeded alike."""
    seen: dict[str, list[Any]] = {name: [] for name in stacks}
    handles = []
    for name, members in stacks.items():

        def enters(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            seen[name].append(_copy([*args, *kwargs.values()]))

        def leaves(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            seen[name].append(_copy(output))

        handles += [members[0].register_forward_pre_hook(enters, with_kwargs=True)]
        handles += [member.register_forward_hook(leaves) for member in members]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return seen, call(imgs)
    finally:
        for handle in handles:
            handle.remove()


def _copy(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor in a module's input or output, as it is now: a later layer may write over it."""
    tensor = _tensor(value)
    return None if tensor is None else tensor.detach().float().clone()


def _tensor(value: Any) -> torch.Tensor | None:
    return next(
        (tensor for tensor in _tensors(value) if tensor.is_floating_point() and tensor.ndim > 1), None
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (
            tensor for key, item in value.items() if "prenorm" not in str(key) for tensor in _tensors(item)
        )
    elif isinstance(value, list | tuple):
        yield from (tensor for item in value for tensor in _tensors(item))


def _fit(stack: Sequence[Any], want: Sequence[Any]) -> bool:
    return all(_like(theirs, ours) is not None for theirs, ours in zip(stack, want, strict=True))


def _like(tensor: torch.Tensor | None, ours: torch.Tensor) -> torch.Tensor | None:
    """The tensor in the shape of ours: maps (N, H, W, D) or (N, D, H, W) as sequences, or the reverse; (L, N, D) as (N, L, D)."""
    if tensor is None:
        return None
    if tensor.shape == ours.shape:
        return tensor
    if tensor.ndim == 3 and tensor.transpose(0, 1).shape == ours.shape:
        return tensor.transpose(0, 1)
    if tensor.ndim + ours.ndim != 7 or tensor.numel() != ours.numel() or len(tensor) != len(ours):
        return None
    if tensor.ndim == 4 and tensor.shape[-1] != ours.shape[-1]:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(ours.shape) if tensor.shape[-1] == ours.shape[-1] else None


def _difference(layer: str, ours: torch.Tensor, theirs: torch.Tensor | None) -> Difference:
    assert theirs is not None
    return Difference(layer, float((ours - theirs).abs().max()), float(ours.abs().max()))


def _final(ours: torch.Tensor, output: Any, prefix: int) -> list[Difference]:
    """The final tokens; where their model does not give all in one tensor, patch tokens and class token as far as it does.

    Of several tensors of the same shape the nearest counts: hidden states of all layers may stand beside the last."""
    parts = {"final patch tokens": ours[:, prefix:]} | ({"final class token": ours[:, 0]} if prefix else {})
    whole = _nearest("final tokens", ours, output)
    return (
        [whole]
        if whole
        else [found for name, part in parts.items() if (found := _nearest(name, part, output))]
    )


def _nearest(name: str, part: torch.Tensor, output: Any) -> Difference | None:
    tensors = [_like(tensor.float(), part) for tensor in _tensors(output) if tensor.is_floating_point()]
    found = [_difference(name, part, tensor) for tensor in tensors if tensor is not None]
    return min(found, key=lambda difference: difference.relative, default=None)


def _other_depth(theirs: nn.Module, depth: int) -> UserError:
    kinds = (nn.ModuleList, nn.Sequential)
    found = [
        f"{name or 'itself'} of {len(m)}"
        for name, m in theirs.named_modules()
        if isinstance(m, kinds) and len(m)
    ]
    listed = ", ".join(found[:8]) or "none"
    return UserError(
        f"their {type(theirs).__name__} has no ModuleList or Sequential of {depth} blocks; it has {listed}",
        expected=f"the same depth, {depth}",
        fix="return the vision encoder itself, in the size of the checkpoint",
    )


def _other_shapes(found: Mapping[str, Sequence[Any]], want: Sequence[torch.Tensor]) -> UserError:
    ran = {name: [tuple(t.shape) for t in stack if t is not None] for name, stack in found.items() if stack}
    told = "; ".join(f"{name}: {', '.join(map(str, dict.fromkeys(shapes)))}" for name, shapes in ran.items())
    return UserError(
        f"the tokens of their blocks are of other shapes: {told or 'none of their blocks was run'}",
        expected=f"{', '.join(map(str, dict.fromkeys(tuple(t.shape) for t in want)))} for {len(want) - 1} blocks, each run once",
        fix="give both the same image size, and switch off masking and pooling before the blocks",
    )


def render(parity: Parity) -> RenderableType:
    """A row a layer, and the verdict."""
    table = Table(box=None, header_style="bold")
    table.add_column("layer")
    for name in ("largest difference", "of the largest value", "relative"):
        table.add_column(name, justify="right")
    for layer in parity.layers:
        style = "" if layer.relative <= parity.tolerance else "red"
        values = (layer.absolute, layer.scale, layer.relative)
        table.add_row(
            Text(layer.layer, style=style), *(Text(f"{value:.3g}", style=style) for value in values)
        )
    return Group(table, *(Text(note) for note in parity.notes), Text(f"\n{verdict(parity)}"))


def verdict(parity: Parity) -> str:
    """One sentence for a person."""
    worst = f"the largest relative difference is {parity.worst.relative:.3g}, in {parity.worst.layer}"
    if first := parity.first:
        return f"They differ from {first.layer} on: {worst}, over the tolerance of {parity.tolerance:g}."
    return f"They are equal within {parity.tolerance:g}: {worst}."
