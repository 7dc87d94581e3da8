"""Write any known checkpoint in another format, and read it back as proof."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Unpack

import torch

from backbones.load import ReadOptions, read_backbone, translate
from backbones.reading.source import open_source
from backbones.target import check_target
from backbones.translating.detect import get_format
from backbones.translating.report import ConversionReport
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec


def convert(source: str | Path, out: str | Path, to: str, **options: Unpack[ReadOptions]) -> ConversionReport:
    """Write the backbone of `source` to `out` in the format `to`, in its stored precision.

    The report states how the checkpoint was read. `out` is a file or a folder, depending on the format
    (`backbones.translating.detect.WRITABLE`). It is read back and compared bit for bit, and removed if it
    differs. options: `backbones.load.ReadOptions`. Raises UserError if `out` exists, and if the format cannot
    express the backbone.
    """
    target = Path(out)
    check_target(target, to)
    checkpoint, translation, spec, report = read_backbone(source, **options)
    get_format(to).write(translation.weights, spec, target, {"converted": asdict(report)})
    try:
        checkpoint.check_unchanged()
        _check_read_back(target, to, translation.weights, spec)
    except UserError:
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
        raise
    return report


def _check_read_back(out: Path, to: str, weights: Mapping[str, torch.Tensor], spec: BackboneSpec) -> None:
    _, translation, found_spec = translate(open_source(out), to)
    found = translation.weights
    same = set(found) == set(weights) and all(
        found[key].dtype == weights[key].dtype and torch.equal(found[key], weights[key]) for key in weights
    )
    if not same or found_spec != spec:
        raise UserError(
            f"{out}: what was read back differs from what was written", fix="check the disk and convert again"
        )
