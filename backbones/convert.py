"""Writes any known checkpoint in another format, and reads it back as proof."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from backbones.load import FILLED, check_fit, make_report, translate
from backbones.reading.source import open_source
from backbones.target import check_target
from backbones.translating.detect import get_format
from backbones.translating.report import ConversionReport
from backbones.translating.structure import infer_global_pool
from mae_bench.errors import UserError
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    format: str | None = None,
    *,
    weights: str | None = None,
    sha256: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> ConversionReport:
    """Writes the backbone of `source` to `out` in the format `to`, in its stored precision; returns how it was read.

    One file or a folder, as `backbones.translating.detect.WRITABLE` says. What is written is read back and must be bit-equal, or it is removed
    again. UserError for an `out` that exists, and for a backbone that the format cannot express.
    """
    target = Path(out)
    check_target(target, to)
    checkpoint = open_source(source, sha256, weights, trust=trust)
    name, translation, spec = translate(checkpoint, format, overrides)
    with torch.device("meta" if spec.arch in FILLED else "cpu"):
        model = build_vit(spec, global_pool=infer_global_pool(translation.weights))
    check_fit(model, translation.weights, checkpoint.source, name)
    report = make_report(checkpoint, name, translation)
    get_format(to).write(translation.weights, spec, target, {"converted": asdict(report)})
    try:
        checkpoint.check_unchanged()
        _prove(target, to, translation.weights, spec)
    except UserError:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        raise
    return report


def _prove(out: Path, to: str, weights: Mapping[str, torch.Tensor], spec: BackboneSpec) -> None:
    _, read_back, spec_back = translate(open_source(out), to)
    found = read_back.weights
    same = set(found) == set(weights) and all(
        found[key].dtype == weights[key].dtype and torch.equal(found[key], weights[key]) for key in weights
    )
    if not same or spec_back != spec:
        raise UserError(
            f"{out} does not read back as what was written", fix="check the disk and convert again"
        )
