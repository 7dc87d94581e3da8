"""Compare a loaded backbone with a reference implementation, layer by layer on the same images."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Unpack

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from backbones.load import ReadOptions, load_backbone
from backbones.probe import draw_sample
from backbones.user_code import call_user_code, load_callable
from mae_bench.data.batches.transforms import build_eval_transform, normalize
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec
from mae_bench.suite.config import source_path

# Shapes: N batch, C channels, H W image, h w grid, L tokens, D width.
TOLERANCE = 1e-5  # relative to the largest value: float32 summation order moves less, any mistake more
MAX_LISTED = 8  # modules in an error message


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of one layer's tokens, and largest absolute value of ours (its scale)."""

    layer: str
    absolute: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference relative to the scale; infinite if a value is not finite."""
        found = self.absolute / self.scale if self.scale else self.absolute
        return found if math.isfinite(found) else math.inf


@dataclass(frozen=True)
class Parity:
    """Differences in layer order: embedding, blocks, final tokens. notes: what was not compared, and why."""

    layers: list[Difference]
    tolerance: float = TOLERANCE
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Difference:
        return max(self.layers, key=lambda layer: layer.relative)

    @property
    def first(self) -> Difference | None:
        """The first layer above the tolerance."""
        return next((layer for layer in self.layers if not layer.relative <= self.tolerance), None)

    @property
    def equal(self) -> bool:
        """Whether every layer is within the tolerance."""
        return self.first is None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; a difference that is not finite is null."""
        rows = [asdict(layer) | {"relative": layer.relative} for layer in self.layers]
        finite = [{key: _null_unless_finite(value) for key, value in row.items()} for row in rows]
        return {"equal": self.equal, "tolerance": self.tolerance, "layers": finite, "notes": self.notes}


def _null_unless_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verify(
    source: str | Path,
    against: str,
    *,
    images: str | Path | None = None,
    num_images: int = 2,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    **options: Unpack[ReadOptions],
) -> Parity:
    """Compare the backbone of `source` with the model that MODULE:CALLABLE returns, in float32 on the CPU.

    The callable is the user's own code, and is run. The images are random, drawn from `seed`, or a random
    sample of the folder `images`. options: `backbones.load.ReadOptions`. Raises UserError if the callable
    cannot be imported, and if the two models have different shapes.
    """
    load_callable(against)  # fail before the checkpoint is read
    ours, spec, _ = load_backbone(source, **options)
    reference = build_reference_model(against, source)
    return compare(ours, reference, draw_images(spec, images, num_images, seed), tolerance)


def build_reference_model(against: str, source: str | Path) -> nn.Module:
    """Call MODULE:CALLABLE, with the path of `source` if it has a required argument."""
    build = load_callable(against)
    path = source_path(str(source)) or source
    args = [str(path)] if _takes_path(build) else []
    model = call_user_code(f"{against} fails", build, *args)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{against} returns an object of type {type(model).__name__}", expected="a torch.nn.Module"
        )
    return model.float().eval()


def _takes_path(function: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable written in C
        return False
    return any(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters)


def draw_images(spec: BackboneSpec, folder: str | Path | None, num_images: int, seed: int) -> torch.Tensor:
    """Return images (N, C, H, W): standard normal noise, or a folder's images normalised as the spec says."""
    if folder is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num_images, spec.in_chans, *spec.img_size, generator=generator)
    transform = build_eval_transform(spec.img_size, interpolation=spec.interpolation)
    imgs, _ = draw_sample(folder, num_images, seed).load_view(transform)
    return normalize(imgs, spec.mean, spec.std)


def compare(
    ours: nn.Module, reference: nn.Module, imgs: torch.Tensor, tolerance: float = TOLERANCE
) -> Parity:
    """Compare a timm ViT with a reference model layer by layer on imgs (N, C, H, W), both in eval mode.

    The reference's blocks are its first ModuleList or Sequential with as many members as ours and outputs of
    the same shapes. Outputs may be tensors, tuples, dictionaries or transformers' ModelOutputs, with patches
    as a sequence or a map. Its final tokens are taken from the output of `forward_features`, else of
    `forward`. Raises UserError if there are no such blocks, and if the reference's forward fails.
    """
    # 1. Record the input and the outputs of our blocks.
    vit: Any = ours.eval()
    blocks = list(vit.blocks)
    recorded, final = _record(vit.forward_features, {"ours": blocks}, imgs)
    want = recorded["ours"]

    # 2. Record those of every stack of modules in the reference that is as deep.
    reference.eval()
    stacks = {
        name: list(module.children())
        for name, module in reference.named_modules()
        if _is_stack(module, len(blocks))
    }
    if not stacks:
        raise _wrong_depth(reference, len(blocks))
    forward = getattr(reference, "forward_features", reference)
    failure = f"the reference's forward fails on images {tuple(imgs.shape)}"
    found, output = call_user_code(failure, _record, forward, stacks, imgs)

    # 3. Compare with the first stack whose tensors have the shapes of ours.
    matching = [stack for stack in found.values() if len(stack) == len(want) and _matches(stack, want)]
    if not matching:
        raise _wrong_shapes(found, want)
    names = ["embedding", *(f"block {i}" for i in range(len(blocks)))]
    pairs = zip(names, want, matching[0], strict=True)
    layers = [_difference(name, mine, _reshape_like(theirs, mine)) for name, mine, theirs in pairs]

    # 4. Compare the final tokens as far as the reference returns them.
    last = _compare_final(final, output, int(getattr(vit, "num_prefix_tokens", 0)))
    notes = []
    if not last:
        notes.append(
            "final tokens: no tensor in the reference's output has their shape; only blocks were compared"
        )
    return Parity([*layers, *last], tolerance, notes)


def _is_stack(module: nn.Module, depth: int) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == depth


@torch.no_grad()
def _record(
    forward: Callable[..., Any], stacks: Mapping[str, Sequence[nn.Module]], imgs: torch.Tensor
) -> tuple[dict[str, list[Any]], Any]:
    """Return, per stack, the input of its first member and each output; and the model's output."""
    seen: dict[str, list[Any]] = {name: [] for name in stacks}
    handles = []
    for name, members in stacks.items():

        def record_input(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            seen[name].append(_copy([*args, *kwargs.values()]))

        def record_output(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            seen[name].append(_copy(output))

        handles += [members[0].register_forward_pre_hook(record_input, with_kwargs=True)]
        handles += [member.register_forward_hook(record_output) for member in members]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return seen, forward(imgs)
    finally:
        for handle in handles:
            handle.remove()


def _copy(value: Any) -> torch.Tensor | None:
    """Copy the first floating-point tensor in a module's input or output: later layers may write in place."""
    for tensor in _find_tensors(value):
        if tensor.is_floating_point() and tensor.ndim > 1:
            return tensor.detach().float().clone()
    return None


def _find_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if "prenorm" not in str(key):  # dinov2's tokens before the final norm
                yield from _find_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _find_tensors(item)


def _matches(stack: Sequence[Any], want: Sequence[Any]) -> bool:
    return all(_reshape_like(theirs, ours) is not None for theirs, ours in zip(stack, want, strict=True))


def _reshape_like(tensor: torch.Tensor | None, ours: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor in the shape of ours, None if it does not fit.

    Converts maps (N, h, w, D) or (N, D, h, w) to sequences (N, L, D) and back, and (L, N, D) to (N, L, D).
    """
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


def _compare_final(ours: torch.Tensor, output: Any, num_prefix_tokens: int) -> list[Difference]:
    """Compare the final tokens or, if the reference returns them separately, patch and class tokens.

    Among several tensors of one shape the nearest counts: an output may list the hidden states of all layers.
    """
    whole = _find_nearest("final tokens", ours, output)
    if whole:
        return [whole]
    parts = {"final patch tokens": ours[:, num_prefix_tokens:]}
    if num_prefix_tokens:
        parts["final class token"] = ours[:, 0]
    found = [_find_nearest(name, part, output) for name, part in parts.items()]
    return [difference for difference in found if difference]


def _find_nearest(name: str, part: torch.Tensor, output: Any) -> Difference | None:
    floats = [tensor.float() for tensor in _find_tensors(output) if tensor.is_floating_point()]
    reshaped = [_reshape_like(tensor, part) for tensor in floats]
    found = [_difference(name, part, tensor) for tensor in reshaped if tensor is not None]
    return min(found, key=lambda difference: difference.relative, default=None)


def _wrong_depth(reference: nn.Module, depth: int) -> UserError:
    kinds = (nn.ModuleList, nn.Sequential)
    found = [
        f"{name or 'the model'} of {len(module)}"
        for name, module in reference.named_modules()
        if isinstance(module, kinds) and len(module)
    ]
    listed = ", ".join(found[:MAX_LISTED]) or "none"
    return UserError(
        f"the reference {type(reference).__name__} has no ModuleList or Sequential of {depth} blocks; "
        f"it has {listed}",
        expected=f"the same depth, {depth}",
        fix="return the vision encoder itself, in the size of the checkpoint",
    )


def _wrong_shapes(found: Mapping[str, Sequence[Any]], want: Sequence[torch.Tensor]) -> UserError:
    listed = "; ".join(f"{name}: {_list_shapes(stack)}" for name, stack in found.items() if stack)
    return UserError(
        f"the tokens of the reference's blocks have other shapes: {listed or 'none of its blocks was run'}",
        expected=f"{_list_shapes(want)} for {len(want) - 1} blocks, each run once",
        fix="use the same image size for both, and switch off masking and pooling before the blocks",
    )


def _list_shapes(tensors: Sequence[torch.Tensor | None]) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in tensors if tensor is not None]
    return ", ".join(dict.fromkeys(shapes))


def render(parity: Parity) -> RenderableType:
    """Render one row per layer, and the verdict."""
    table = Table(box=None, header_style="bold")
    table.add_column("layer")
    for name in ("largest difference", "largest value", "relative"):
        table.add_column(name, justify="right")
    for layer in parity.layers:
        style = "" if layer.relative <= parity.tolerance else "red"
        values = (layer.absolute, layer.scale, layer.relative)
        cells = [Text(f"{value:.3g}", style=style) for value in values]
        table.add_row(Text(layer.layer, style=style), *cells)
    return Group(table, *(Text(note) for note in parity.notes), Text(f"\n{verdict(parity)}"))


def verdict(parity: Parity) -> str:
    """Return one sentence that states whether the models are equal."""
    worst = f"the largest relative difference is {parity.worst.relative:.3g}, in {parity.worst.layer}"
    if parity.first:
        above = f"above the tolerance of {parity.tolerance:g}"
        return f"The models differ from {parity.first.layer} on: {worst}, {above}."
    return f"The models are equal within {parity.tolerance:g}: {worst}."
