"""Two-way tables between another library's tensor names and timm's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from backbones.translating.translation import Translation, explain
from mae_bench.errors import UserError

TENSORS = ("weight", "bias")
QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Naming:
    """Tensor names of one layout, theirs -> timm's.

    A module's name stands for its weight and bias, any other name for one tensor. Where a library has had
    several names for one module, all are read and the first is written. An entry of `block` for a single
    tensor (such as the query's bias) takes precedence over `qkv`.

    Attributes:
        top: Names outside the blocks.
        block: Names inside a block.
        blocks: Prefixes of the names inside block {}.
        qkv: Modules for query, key and value inside a block, which timm stacks.
        drop: Pattern (re.match) -> reason.
    """

    top: Mapping[str, str]
    block: Mapping[str, str]
    blocks: tuple[str, ...]
    qkv: tuple[tuple[str, str, str], ...] = ()
    drop: Mapping[str, str] = field(default_factory=dict)

    def read(self, tensors: Mapping[str, torch.Tensor], source: str) -> Translation:
        """Translate to timm's names. Unknown tensors keep theirs and fail the later check against the model.

        Raise UserError where query, key and value do not fit together.
        """
        result = Translation(dropped=explain(tensors, self.drop))
        parts: dict[str, dict[int, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name in result.dropped:
                continue
            new_name, part = self.translate(name)
            result.renamed[name] = new_name
            if new_name in result.weights or part in parts.get(new_name, ()):
                raise UserError(
                    f"{source}: {name} and another tensor are both {new_name}", expected="each weight once"
                )
            if part is None:
                result.weights[new_name] = tensor
            else:
                parts.setdefault(new_name, {})[part] = tensor
        for new_name, found in parts.items():
            result.weights[new_name] = _stack_qkv(source, new_name, found)
            result.reshaped[new_name] = "query, key and value stacked"
        return result

    def translate(self, name: str) -> tuple[str, int | None]:
        """Return timm's name for one of theirs, and the index in `QKV` for a part of qkv, else None."""
        for blocks in self.blocks:
            before, after = (re.escape(part) for part in blocks.split("{}"))
            match = re.match(rf"{before}(\d+){after}(.+)$", name)
            if not match:
                continue
            number, inside = match.groups()
            module, _, tensor = inside.rpartition(".")
            for modules in self.qkv:
                if module in modules and tensor in TENSORS and inside not in self.block:
                    return f"blocks.{number}.attn.qkv.{tensor}", modules.index(module)
            return f"blocks.{number}.{_rename(inside, self.block)}", None
        return _rename(name, self.top), None

    def write(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors under their names, the reverse of `read`.

        Raise UserError for a tensor without a name in this layout.
        """
        top, block = _reverse(self.top), _reverse(self.block)
        result: dict[str, torch.Tensor] = {}
        for name, tensor in weights.items():
            prefix, table, inside = "", top, name
            match = re.match(r"blocks\.(\d+)\.(.+)$", name)
            if match:
                prefix, table, inside = self.blocks[0].format(match[1]), block, match[2]
            module, _, kind = inside.rpartition(".")
            if prefix and self.qkv and module == "attn.qkv":
                for part, value in zip(self.qkv[0], tensor.chunk(3), strict=True):
                    result[f"{prefix}{part}.{kind}"] = value.clone()
                continue
            if inside not in table and module not in table:
                raise UserError(f"{name} has no name in this format", fix="write it as mae_bench or timm")
            result[prefix + _rename(inside, table)] = tensor
        return result


def _stack_qkv(source: str, name: str, parts: Mapping[int, torch.Tensor]) -> torch.Tensor:
    shapes = {QKV[part]: tuple(tensor.shape) for part, tensor in sorted(parts.items())}
    if len(parts) != 3 or len(set(shapes.values())) != 1 or () in shapes.values():
        raise UserError(
            f"{source}: {name} would be made of {shapes}", expected="query, key and value of one shape"
        )
    return torch.cat([parts[part] for part in range(3)])


def _reverse(table: Mapping[str, str]) -> dict[str, str]:
    """Return timm's name -> theirs; where several of theirs share one of timm's, the first."""
    return {new_name: name for name, new_name in reversed(list(table.items()))}


def _rename(name: str, table: Mapping[str, str]) -> str:
    """Return the other name of a tensor, from its own entry or from its module's."""
    if name in table:
        return table[name]
    module, dot, tensor = name.rpartition(".")
    return f"{table[module]}.{tensor}" if dot and module in table else name
