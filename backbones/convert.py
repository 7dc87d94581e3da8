"""Writes any known checkpoint in another format, and reads it back as proof."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from backbones.detect import FORMATS, format_named
from backbones.load import check_fit, make_report, stored_pooling, translate
from backbones.report import ConversionReport
from backbones.source import open_source
from mae_bench.errors import UserError
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec

SUFFIXES = {"official_mae": (".pth", ".pt"), "timm": (".safetensors",)}  # the other formats are folders


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    format: str | None = None,
    *,
    weights: str | None = None,
    sha256: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Writes the backbone of `source` to `out` in the format `to`, in its stored precision; returns how it was read.

    A folder for mae_bench and hf_vitmae, one file for timm (.safetensors) and official_mae (.pth). What is written is read
    back and must be bit-equal. UserError for an `out` that exists, or a backbone that the format cannot express.
    """
    target = _checked_target(Path(out), to)
    checkpoint = open_source(source, sha256, weights)
    name, translation, spec = translate(checkpoint, format, overrides)
    with torch.device("meta" if spec.arch == "vit" else "cpu"):
        model = build_vit(spec, global_pool=stored_pooling(translation.weights))
    check_fit(model, translation.weights, checkpoint.source, name)
    report = make_report(checkpoint, name, translation)
    format_named(to).write(translation.weights, spec, target, {"converted": asdict(report)})
    _prove(target, to, translation.weights, spec)
    return report


def _checked_target(out: Path, to: str) -> Path:
    if to not in FORMATS:
        raise UserError(f"unknown format {to!r}", expected=f"one of {', '.join(FORMATS)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already", fix="remove it or name another")
    if (suffixes := SUFFIXES.get(to)) and out.suffix not in suffixes:
        raise UserError(f"{out} as a file of {to}", expected=f"a name that ends in {' or '.join(suffixes)}")
    return out


def _prove(out: Path, to: str, weights: Mapping[str, torch.Tensor], spec: BackboneSpec) -> None:
    _, read_back, spec_back = translate(open_source(out), to)
    found = read_back.weights
    same = set(found) == set(weights) and all(
        found[key].dtype == weights[key].dtype and torch.equal(found[key], weights[key]) for key in weights
    )
    if not same or spec_back != spec:
        raise UserError(f"{out} does not read back as what was written", fix="check the disk and convert again")
