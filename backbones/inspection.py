"""Describe a checkpoint (format, architecture, sizes, digests, spec, report) as JSON or for a terminal."""

import argparse
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from backbones.load import ReadOptions, read_backbone
from backbones.reading.source import Checkpoint
from backbones.reading.unwrap import SeveralSets
from backbones.translating.origins import find_family, find_origins, get_published
from backbones.translating.report import read_assumptions
from mae_bench.errors import UserError
from mae_bench.models.vit import ARCHS
from mae_bench.spec import BackboneSpec

NAMES = {  # (embed_dim, depth) of the standard ViTs
    (192, 12): "ViT-Ti",
    (384, 12): "ViT-S",
    (768, 12): "ViT-B",
    (1024, 24): "ViT-L",
    (1280, 32): "ViT-H",
}
MAX_TEXT = 1000  # characters of a string in a file that are shown
PARTS = {  # pattern of a dropped tensor's name -> the part of the model it belongs to; the first match counts
    r"(^|\.)\w*decoder": "decoder",
    r"(^|\.)mask_token": "mask token",
    r"(^|\.)(\w*head\w*|\w*classifier|fc|projector|predictor|visual_projection)\.": "head",
    r"(^|\.)(text_model|transformer\.resblocks|token_embedding|text_projection)(\.|$)": "text tower",
}
TRAINING_STATE = (  # keys of a file that hold the state of its training
    "optimizer",
    "optimizer_states",
    "optim",
    "scaler",
    "loss_scaler",
    "lr_schedulers",
    "scheduler",
    "amp",
)
SET_FIELDS = ("weights", "format", "architecture", "tensors", "parameters")  # shown for each of several sets


def inspect_checkpoint(source: str | Path, **options: Unpack[ReadOptions]) -> dict[str, Any]:
    """Return a JSON-ready description of a checkpoint; raise UserError where `load_backbone` does.

    If the file holds several sets of ViT weights and `weights` names none of them, the description lists the
    sets (`sets`). options: `backbones.load.ReadOptions`.
    """
    try:
        checkpoint, translation, spec, report = read_backbone(source, **options)
    except SeveralSets as several:
        if options.get("weights") is not None:
            raise
        return _describe_sets(source, several.labels, options)
    account = report.to_dict()
    return {
        "source": checkpoint.source,
        "format": report.format,
        "architecture": describe_architecture(spec),
        "weights": checkpoint.label,
        "licence": checkpoint.licence,
        "published_score": checkpoint.score,
        "sha256": checkpoint.digest,
        "files": checkpoint.files,
        "bytes": checkpoint.size,
        "tensors": len(checkpoint.stored),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.stored.values())),
        "parameters": {
            "backbone": sum(tensor.numel() for tensor in translation.weights.values()),
            **_count_dropped(checkpoint, report.dropped),
        },
        "training_state": [key for key in checkpoint.extras if key in TRAINING_STATE],
        "wrapper": checkpoint.wrapper,
        "extras": {str(key): _summarise(value) for key, value in checkpoint.extras.items()},
        "spec": spec.to_dict(),
        "origins": find_origins(report.format, translation, checkpoint, spec, options.get("overrides")),
        "assumed_before": read_assumptions(checkpoint.conversion),
        "published": get_published(find_family(report.format, translation.assumed)),
        "report": account,
    }


def _describe_sets(source: str | Path, labels: list[str], options: ReadOptions) -> dict[str, Any]:
    """Describe each set under the label that `weights` takes, or why it cannot be read."""
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for label in labels:
        try:
            one: ReadOptions = {**options, "weights": label}
            found = inspect_checkpoint(source, **one)
        except UserError as error:
            rows.append({"weights": label, "error": error.given, "fix": error.fix})
            continue
        rows.append({key: found[key] for key in SET_FIELDS})
    file = {key: found[key] for key in ("sha256", "files", "bytes") if found}
    return {"source": str(source), **file, "sets": rows}


def describe_architecture(spec: BackboneSpec) -> str:
    """Return ViT-B/16 or the sizes of another ViT, with its class unless that is "vit"."""
    if spec.arch not in ARCHS:
        return spec.arch
    patch = "x".join(map(str, dict.fromkeys(spec.patch_size)))
    sizes = f"width {spec.embed_dim}, depth {spec.depth}, {spec.num_heads} heads"
    name = NAMES.get((spec.embed_dim, spec.depth), f"ViT ({sizes})")
    return f"{name}/{patch}" + ("" if spec.arch == "vit" else f" as {spec.arch}")


def _count_dropped(checkpoint: Checkpoint, dropped: Mapping[str, str]) -> dict[str, int]:
    """Return the number of dropped parameters per part of the model; integer tensors do not count."""
    parts: Counter[str] = Counter()
    stored = checkpoint.stored
    for key in dropped:
        if stored[key].is_floating_point():
            parts[identify_part(key)] += stored[key].numel()
    return {part: count for part, count in parts.items() if count}


def identify_part(key: str) -> str:
    """Return the part of the model that a dropped tensor belongs to, by its name."""
    return next((part for pattern, part in PARTS.items() if re.search(pattern, key)), "other")


def _summarise(value: Any) -> Any:
    """Return numbers, strings and command lines as they are, and the type and size of anything else."""
    if isinstance(value, argparse.Namespace):
        return {key: _summarise(item) for key, item in vars(value).items()}
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of length {len(value)}"
    if isinstance(value, str):
        return value[:MAX_TEXT] + ("..." if len(value) > MAX_TEXT else "")
    is_int = isinstance(value, int) and abs(value) < 2**64
    is_float = isinstance(value, float) and math.isfinite(value)
    return value if value is None or is_int or is_float else type(value).__name__


def render(inspection: Mapping[str, Any]) -> RenderableType:
    """Render a description: facts, digests, spec with origins, and keys; or the sets to choose from."""
    if "sets" in inspection:
        return _render_sets(inspection)
    size = f"{inspection['bytes'] / 2**20:.1f} MiB, {inspection['tensors']} tensors"
    facts = {
        "format": inspection["format"],
        "architecture": inspection["architecture"],
        "licence": inspection["licence"] or "unknown: see where the weights were published",
        **({"published score": inspection["published_score"]} if inspection["published_score"] else {}),
        "size": f"{size}, {', '.join(inspection['dtypes'])}",
        **{f"{part} parameters": f"{count:,}" for part, count in inspection["parameters"].items()},
        **{f"also in the file: {key}": value for key, value in inspection["extras"].items()},
    }
    return Group(
        _table(facts, inspection["source"]),
        _render_digests(inspection["files"] or {inspection["source"]: inspection["sha256"]}),
        _render_spec(inspection),
        _render_keys(inspection["report"]),
    )


def _render_keys(report: Mapping[str, Any]) -> RenderableType:
    """Render the number of tensors that were kept, dropped and reshaped, with the reasons, and the notes."""
    renamed = sum(name != target for name, target in report["renamed"].items())
    dropped = Counter(report["dropped"].values())
    reshaped = Counter(report["reshaped"].values())
    rows = {
        "kept": f"{_count(len(report['renamed']))}, {renamed} renamed",
        **{f"dropped: {reason}": _count(count) for reason, count in dropped.items()},
        **{f"reshaped: {what}": _count(count) for what, count in reshaped.items()},
        **{f"note {number}": note for number, note in enumerate(report["notes"], 1)},
    }
    return _table(rows, "keys")


def _count(num_tensors: int) -> str:
    return f"{num_tensors} tensor" + ("" if num_tensors == 1 else "s")


def _render_digests(files: Mapping[str, str]) -> RenderableType:
    """Render digests as sha256sum prints them: one unwrapped line per file, however narrow the terminal."""
    lines = [_unwrapped(f"{digest}  {name}") for name, digest in files.items()]
    return Group("", _text("sha256", "bold"), *lines)


def _render_spec(inspection: Mapping[str, Any]) -> RenderableType:
    """Render each field of the spec with its value and origin.

    A family's sources are numbered footnotes; what was assumed before a conversion follows them.
    """
    sources: dict[str, int] = {}
    rows = {}
    for key, value in inspection["spec"].items():
        origin = inspection["origins"][key]
        family, _, source = origin.partition(": ")
        if family.startswith("family ") and source:
            origin = f"{family} [{sources.setdefault(source, len(sources) + 1)}]"
        rows[key] = (value, origin)
    footnotes = [_text(f"[{number}] {source}") for source, number in sources.items()]
    footnotes += [_text(f"assumed before the conversion: {line}") for line in inspection["assumed_before"]]
    return Group(_table(rows, "spec"), *footnotes)


def _render_sets(inspection: Mapping[str, Any]) -> RenderableType:
    """Render each set as the option that selects it, followed by what it is or why it cannot be read."""
    lines: list[RenderableType] = []
    for row in inspection["sets"]:
        option = f"--weights {shlex.quote(row['weights'])}"
        if "error" in row:
            description = row["error"]
        else:
            parameters = f"{row['parameters']['backbone']:,} parameters"
            description = f"{row['format']}, {row['architecture']}, {parameters}"
        lines += [_unwrapped(option, "cyan"), Padding(_text(description), (0, 0, 0, 4))]
    title = f"{inspection['source']} holds {len(inspection['sets'])} sets of ViT weights; select one with"
    return Group("", _text(title, "bold"), *lines, _render_digests(inspection.get("files", {})))


def render_published(values: Mapping[str, Any]) -> RenderableType:
    """Render the preprocessing and pooling that the family's authors publish, if they are known."""
    if not values:
        return Text("No published preprocessing is known for these weights.")
    rows = {key: value for key, value in values.items() if key not in ("family", "source")}
    return _table(rows, f"published for {values['family']}: {values['source']}")


def _table(rows: Mapping[str, Any], title: str) -> RenderableType:
    """Render names and values under a title; a tuple fills several columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    for name, value in rows.items():
        cells = value if isinstance(value, tuple) else (value,)
        while len(table.columns) <= len(cells):
            table.add_column(overflow="fold")
        table.add_row(_text(name, "cyan"), *(_text(cell) for cell in cells))
    return Group("", _text(title, "bold"), table)


def _unwrapped(line: str, style: str = "") -> Text:
    """Return a line that can be copied: never wrapped or cropped."""
    text = _text(line, style)
    text.no_wrap, text.overflow = True, "ignore"
    return text


def _text(value: Any, style: str = "") -> Text:
    """Return plain text: names in a file may look like markup or contain terminal control characters."""
    printable = [c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value)]
    return Text("".join(printable), style=style)
