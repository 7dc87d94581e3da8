"""What is in a checkpoint: its format, architecture, sizes, digest, contents, spec and report, as JSON or for a terminal."""

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from backbones.load import make_report, translate
from backbones.source import Checkpoint, open_source
from mae_bench.spec import BackboneSpec

NAMES = {(192, 12): "ViT-Ti", (384, 12): "ViT-S", (768, 12): "ViT-B", (1024, 24): "ViT-L", (1280, 32): "ViT-H"}  # (width, depth)
PARTS = {r"decoder|mask_token": "decoder", r"head\.": "head"}  # what a key's beginning says that it belongs to


def inspect_checkpoint(
    source: str | Path, format: str | None = None, overrides: Mapping[str, Any] | None = None, weights: str | None = None
) -> dict[str, Any]:
    """A JSON-ready description of a checkpoint; everything that `load_backbone` refuses raises the same UserError here."""
    checkpoint = open_source(source, weights=weights)
    name, translation, spec = translate(checkpoint, format, overrides)
    return {
        "source": checkpoint.source,
        "format": name,
        "architecture": architecture(spec),
        "sha256": checkpoint.digest,
        "bytes": checkpoint.size,
        "tensors": len(checkpoint.stored),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.stored.values())),
        "parameters": {
            "backbone": sum(tensor.numel() for tensor in translation.weights.values()),
            **_parts(checkpoint),
        },
        "wrapper": checkpoint.wrapper,
        "extras": {str(key): _summary(value) for key, value in checkpoint.extras.items()},
        "spec": spec.to_dict(),
        "report": make_report(checkpoint, name, translation).to_dict(),
    }


def architecture(spec: BackboneSpec) -> str:
    """ViT-B/16 and its like, else the widths; a timm name as it is."""
    if spec.arch != "vit":
        return spec.arch
    patch = "x".join(map(str, dict.fromkeys(spec.patch_size)))
    name = NAMES.get((spec.embed_dim, spec.depth), f"ViT (width {spec.embed_dim}, depth {spec.depth}, {spec.num_heads} heads)")
    return f"{name}/{patch}"


def _parts(checkpoint: Checkpoint) -> dict[str, int]:
    parts: Counter[str] = Counter()
    for key, tensor in checkpoint.stored.items():
        if part := next((part for pattern, part in PARTS.items() if re.match(pattern, key)), None):
            parts[part] += tensor.numel()
    return dict(parts)


def _summary(value: Any) -> Any:
    """Numbers, strings and command lines as they are; of anything else its size."""
    if isinstance(value, argparse.Namespace):
        return {key: _summary(item) for key, item in vars(value).items()}
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return type(value).__name__


def render(inspection: Mapping[str, Any]) -> RenderableType:
    """The description for a terminal: a table of what it is, one of the spec, and what became of the keys."""
    facts = _table(
        {
            "format": inspection["format"],
            "architecture": inspection["architecture"],
            "sha256": inspection["sha256"],
            "size": f"{inspection['bytes'] / 2**20:.1f} MiB, {inspection['tensors']} tensors, {', '.join(inspection['dtypes'])}",
            **{f"{part} parameters": f"{count:,}" for part, count in inspection["parameters"].items()},
            **{f"also in the file: {key}": value for key, value in inspection["extras"].items()},
        },
        inspection["source"],
    )
    report = inspection["report"]
    reasons = Counter(report["dropped"].values())
    account = {
        "kept": f"{len(report['renamed'])} tensors, {sum(a != b for a, b in report['renamed'].items())} under another name",
        **{f"dropped: {reason}": f"{count} tensors" for reason, count in reasons.items()},
        **{f"reshaped: {what}": f"{count} tensors" for what, count in Counter(report["reshaped"].values()).items()},
        **{f"note {number}": note for number, note in enumerate(report["notes"], 1)},
    }
    return Group(facts, _table(inspection["spec"], "spec"), _table(account, "keys"))


def _table(rows: Mapping[str, Any], title: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")  # a digest is worth nothing cut short
    for name, value in rows.items():
        table.add_row(Text(name, style="cyan"), Text(str(value)))  # Text: names in a file may look like markup
    return table
