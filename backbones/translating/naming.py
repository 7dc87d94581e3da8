"""Two-way tables between another library's tensor names and timm's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from backbones.translating.translation import Translation
from mae_bench.errors import UserError

TENSORS = ("weight", "bias")


@dataclass(frozen=True)
class Naming:
    """Names of one layout, theirs -> ours; a module's name stands for its weight and bias, any other name for one tensor.

    top: outside the blocks. block: inside a block. blocks: what stands before the name inside block {}. qkv: their modules for
    query, key and value inside a block, which are stacked to ours. drop: pattern (re.match) -> reason.
    Where a library has had several names for one thing, all are read, and the first is written. An entry of `block` for a single
    tensor (a bias of query) stands before qkv.
    """

    top: Mapping[str, str]
    block: Mapping[str, str]
    blocks: tuple[str, ...]
    qkv: tuple[tuple[str, str, str], ...] = ()
    drop: Mapping[str, str] = field(default_factory=dict)

    def read(self, tensors: Mapping[str, torch.Tensor], source: str) -> Translation:
        """Our names; a tensor that the table does not know keeps its name, and the model's keys decide.

        UserError where query, key and value do not fit together."""
        result = Translation()
        parts: dict[str, dict[int, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if reason := next(
                (reason for pattern, reason in self.drop.items() if re.match(pattern, name)), None
            ):
                result.dropped[name] = reason
                continue
            ours, part = self.ours(name)
            result.renamed[name] = ours
            if ours in result.weights or part in parts.get(ours, ()):
                raise UserError(
                    f"{source}: {name} and another tensor are both {ours}", expected="each weight once"
                )
            if part is None:
                result.weights[ours] = tensor
            else:
                parts.setdefault(ours, {})[part] = tensor
        for ours, found in parts.items():
            result.weights[ours] = self._stack(source, ours, found)
            result.reshaped[ours] = "query, key and value stacked"
        return result

    def ours(self, name: str) -> tuple[str, int | None]:
        """Our name for one of theirs, and which of query, key, value it is (None for other tensors)."""
        for blocks in self.blocks:
            before, after = (re.escape(part) for part in blocks.split("{}"))
            if match := re.match(rf"{before}(\d+){after}(.+)$", name):
                number, inside = match.groups()
                module, _, tensor = inside.rpartition(".")
                for modules in self.qkv:
                    if module in modules and tensor in TENSORS and inside not in self.block:
                        return f"blocks.{number}.attn.qkv.{tensor}", modules.index(module)
                return f"blocks.{number}.{_rename(inside, self.block)}", None
        return _rename(name, self.top), None

    def write(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reverse of `read`; UserError for a tensor that this layout has no name for."""
        top, block = (
            {ours: theirs for theirs, ours in reversed(list(table.items()))}
            for table in (self.top, self.block)
        )
        result: dict[str, torch.Tensor] = {}
        for name, tensor in weights.items():
            place, table, inside = "", top, name
            if match := re.match(r"blocks\.(\d+)\.(.+)$", name):
                place, table, inside = self.blocks[0].format(match[1]), block, match[2]
            module, _, kind = inside.rpartition(".")
            if place and self.qkv and module == "attn.qkv":
                for part, value in zip(self.qkv[0], tensor.chunk(3), strict=True):
                    result[f"{place}{part}.{kind}"] = value.clone()
                continue
            theirs = _rename(inside, table)
            if inside not in table and module not in table:
                raise UserError(f"{name} has no name in this format", fix="write it as mae_bench or timm")
            result[place + theirs] = tensor
        return result

    def _stack(self, source: str, ours: str, found: Mapping[int, torch.Tensor]) -> torch.Tensor:
        shapes = {
            ("query", "key", "value")[part]: tuple(tensor.shape) for part, tensor in sorted(found.items())
        }
        if len(found) != 3 or len(set(shapes.values())) != 1 or () in shapes.values():
            raise UserError(
                f"{source}: {ours} would be made of {shapes}", expected="query, key and value of one shape"
            )
        return torch.cat([found[part] for part in range(3)])


def _rename(name: str, table: Mapping[str, str]) -> str:
    """The other name of a tensor, by its own entry or by its module's."""
    if name in table:
        return table[name]
    module, dot, tensor = name.rpartition(".")
    return f"{table[module]}.{tensor}" if dot and module in table else name
