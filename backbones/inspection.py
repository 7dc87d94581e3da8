"""What is in a checkpoint: its format, architecture, sizes, digests, contents, spec and report, as JSON or for a terminal."""

import argparse
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from backbones.load import check_fit, make_report, translate
from backbones.reading.source import Checkpoint, open_source
from backbones.reading.unwrap import SeveralSets
from backbones.translating.origins import find_family, find_origins, get_published
from backbones.translating.structure import infer_global_pool
from mae_bench.errors import UserError
from mae_bench.models.vit import ARCHS, build_vit
from mae_bench.spec import BackboneSpec

NAMES = {
    (192, 12): "ViT-Ti",
    (384, 12): "ViT-S",
    (768, 12): "ViT-B",
    (1024, 24): "ViT-L",
    (1280, 32): "ViT-H",
}  # (width, depth)
LONGEST = 1000  # characters of a text in a file that are shown
PARTS = {  # what a component of a dropped tensor's name says that it belongs to; the first that fits
    r"(^|\.)\w*decoder": "decoder",
    r"(^|\.)mask_token": "mask token",
    r"(^|\.)(\w*head\w*|\w*classifier|fc|projector|predictor|visual_projection)\.": "head",
    r"(^|\.)(text_model|transformer\.resblocks|token_embedding|text_projection)(\.|$)": "text tower",
}
STATES = (
    "optimizer",
    "optimizer_states",
    "optim",
    "scaler",
    "loss_scaler",
    "lr_schedulers",
    "scheduler",
    "amp",
)  # of a training


def inspect_checkpoint(
    source: str | Path,
    format: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
    *,
    trust: bool = False,
) -> dict[str, Any]:
    """A JSON-ready description of a checkpoint; everything that `load_backbone` refuses raises the same UserError here.

    A file with several sets of ViT weights, of which `weights` names none, is described by the list of them (`sets`).
    """
    try:
        checkpoint = open_source(source, weights=weights, trust=trust)
    except SeveralSets as several:
        if weights is not None:
            raise
        return _describe_sets(source, several.labels, format, overrides, trust)
    name, translation, spec = translate(checkpoint, format, overrides)
    with torch.device("meta" if spec.arch == "vit" else "cpu"):
        model = build_vit(spec, global_pool=infer_global_pool(translation.weights))
    check_fit(model, translation.weights, checkpoint.source, name)
    report = make_report(checkpoint, name, translation).to_dict()
    return {
        "source": checkpoint.source,
        "format": name,
        "architecture": architecture(spec),
        "weights": checkpoint.label,
        "sha256": checkpoint.digest,
        "files": checkpoint.files,
        "bytes": checkpoint.size,
        "tensors": len(checkpoint.stored),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.stored.values())),
        "parameters": {
            "backbone": sum(tensor.numel() for tensor in translation.weights.values()),
            **_parts(checkpoint, report["dropped"]),
        },
        "training_state": [key for key in checkpoint.extras if key in STATES],
        "wrapper": checkpoint.wrapper,
        "extras": {str(key): _summary(value) for key, value in checkpoint.extras.items()},
        "spec": spec.to_dict(),
        "origins": find_origins(name, translation, checkpoint, spec, overrides),
        "published": get_published(find_family(name, translation.assumed)),
        "report": report,
    }


def _describe_sets(
    source: str | Path,
    labels: list[str],
    format: str | None,
    overrides: Mapping[str, Any] | None,
    trust: bool,
) -> dict[str, Any]:
    """Each set by what `--weights` calls it, with what it is or why it cannot be read."""
    rows: list[dict[str, Any]] = []
    told: dict[str, Any] = {}
    for label in labels:
        try:
            told = inspect_checkpoint(source, format, overrides, label, trust=trust)
            rows.append(
                {key: told[key] for key in ("weights", "format", "architecture", "tensors", "parameters")}
            )
        except UserError as error:
            rows.append({"weights": label, "error": error.given, "fix": error.fix})
    file = {key: told[key] for key in ("sha256", "files", "bytes") if told}
    return {"source": str(source), **file, "sets": rows}


def architecture(spec: BackboneSpec) -> str:
    """ViT-B/16 and its like, else the widths; with the class that builds it unless that is "vit"; a timm name as it is."""
    if spec.arch not in ARCHS:
        return spec.arch
    patch = "x".join(map(str, dict.fromkeys(spec.patch_size)))
    widths = f"width {spec.embed_dim}, depth {spec.depth}, {spec.num_heads} heads"
    name = NAMES.get((spec.embed_dim, spec.depth), f"ViT ({widths})")
    return f"{name}/{patch}" + ("" if spec.arch == "vit" else f" as {spec.arch}")


def _parts(checkpoint: Checkpoint, dropped: Mapping[str, str]) -> dict[str, int]:
    """Parameters of what is left out, by what it belongs to."""
    parts: Counter[str] = Counter()
    stored = checkpoint.stored
    for key in dropped:
        if stored[key].is_floating_point():  # else an index or a counter
            parts[part_of(key)] += stored[key].numel()
    return {part: count for part, count in parts.items() if count}


def part_of(key: str) -> str:
    """What a tensor that is left out belongs to, by its name."""
    return next((part for pattern, part in PARTS.items() if re.search(pattern, key)), "other")


def _summary(value: Any) -> Any:
    """Numbers, strings and command lines as they are; of anything else its size."""
    if isinstance(value, argparse.Namespace):
        return {key: _summary(item) for key, item in vars(value).items()}
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, str):
        return value[:LONGEST] + ("..." if len(value) > LONGEST else "")
    if (
        value is None
        or (isinstance(value, int) and abs(value) < 2**64)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    return type(value).__name__


def render(inspection: Mapping[str, Any]) -> RenderableType:
    """The description for a terminal: what it is, the spec with its origins, what became of the keys; or the sets to choose."""
    if "sets" in inspection:
        return _render_sets(inspection)
    facts = _table(
        {
            "format": inspection["format"],
            "architecture": inspection["architecture"],
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
        **{
            f"reshaped: {what}": f"{count} tensors"
            for what, count in Counter(report["reshaped"].values()).items()
        },
        **{f"note {number}": note for number, note in enumerate(report["notes"], 1)},
    }
    digests = _digests(inspection["files"] or {"it": inspection["sha256"]})
    return Group(facts, digests, _render_spec(inspection), _table(account, "keys"))


def _digests(files: Mapping[str, str]) -> RenderableType:
    """As sha256sum prints them: a line each, however narrow the terminal."""
    return Group(
        "", _text("sha256", "bold"), *(_whole(f"{digest}  {name}") for name, digest in files.items())
    )


def _render_spec(inspection: Mapping[str, Any]) -> RenderableType:
    """Fields, values and origins; where a family publishes its fields stands once, below."""
    places: dict[str, int] = {}
    rows = {}
    for key, value in inspection["spec"].items():
        origin, _, place = inspection["origins"][key].partition(": ")
        if origin.startswith("family ") and place:
            origin += f" [{places.setdefault(place, len(places) + 1)}]"
        else:
            origin = inspection["origins"][key]
        rows[key] = (value, origin)
    return Group(_table(rows, "spec"), *(_text(f"[{number}] {place}") for place, number in places.items()))


def _render_sets(inspection: Mapping[str, Any]) -> RenderableType:
    """For each set what chooses it, as it is copied, and what it is or why it cannot be read."""
    lines: list[RenderableType] = []
    for found in inspection["sets"]:
        told = found.get("error") or (
            f"{found['format']}, {found['architecture']}, {found['parameters']['backbone']:,} parameters"
        )
        lines += [
            _whole(f"--weights {shlex.quote(found['weights'])}", "cyan"),
            Padding(_text(told), (0, 0, 0, 4)),
        ]
    title = f"{inspection['source']} holds {len(inspection['sets'])} sets of ViT weights; say which with"
    return Group("", _text(title, "bold"), *lines, _digests(inspection.get("files", {})))


def render_published(found: Mapping[str, Any]) -> RenderableType:
    """How the family's authors feed it, for beside a suggestion; one line where the family is not known."""
    if not found:
        return Text("No published values are known for these weights.")
    rows = {key: value for key, value in found.items() if key not in ("family", "source")}
    return _table(rows, f"published for {found['family']}: {found['source']}")


def _table(rows: Mapping[str, Any], title: str) -> RenderableType:
    """Names and values; a tuple is several columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    for name, value in rows.items():
        cells = value if isinstance(value, tuple) else (value,)
        while len(table.columns) <= len(cells):
            table.add_column(overflow="fold")
        table.add_row(_text(name, "cyan"), *(_text(cell) for cell in cells))
    return Group("", _text(title, "bold"), table)


def _whole(line: str, style: str = "") -> Text:
    """A line to copy: never wrapped nor cut."""
    text = _text(line, style)
    text.no_wrap, text.overflow = True, "ignore"
    return text


def _text(value: Any, style: str = "") -> Text:
    """Names in a file may look like markup, and may hold what steers a terminal."""
    return Text(
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value)), style=style
    )
