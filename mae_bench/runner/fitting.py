"""Fit the config of a transfer to its backbone, and find what does not fit before any cell runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_bench.config import build, expand_variables
from mae_bench.data.checks.channels import LAYOUTS, check_channels, trains_on_arrays
from mae_bench.errors import UserError
from mae_bench.job import EXPORT, SPEC_FILE
from mae_bench.record import ResultRecord
from mae_bench.registry import Kind, kind, load_object
from mae_bench.seal import read_sealed_json
from mae_bench.spec import BackboneSpec
from mae_bench.suite.cell import Cell
from mae_bench.suite.config import Place


@dataclass(frozen=True)
class Preview:
    """What is known of a backbone before the transfers run.

    Attributes:
        spec: None if it is not known yet, for example of weights that are not downloaded.
        assumptions: what was assumed about a checkpoint, one sentence per source of an assumption.
        error: why the checkpoint cannot be read.
    """

    spec: BackboneSpec | None = None
    assumptions: tuple[str, ...] = ()
    error: UserError | None = None


class ImageSets:
    """What the images of each set are; a set is read once for all cells.

    Attributes:
        digests: of the sets that exist, by layout and folder; another set is not read.
    """

    def __init__(self, digests: Mapping[Place, str]) -> None:
        self.digests = digests
        self._arrays: dict[Place, bool] = {}
        self._problems: dict[tuple[Place, int], UserError | None] = {}

    def hold_arrays(self, place: Place) -> bool:
        """Return whether the training images are arrays, as far as that is known."""
        if place not in self._arrays:
            self._arrays[place] = self._is_readable(place) and trains_on_arrays(*_expand(place))
        return self._arrays[place]

    def find_problem(self, place: Place, in_chans: int) -> UserError | None:
        """Return why the images do not have these channels; None if they have, or if that is not known."""
        if not self._is_readable(place):
            return None
        if (place, in_chans) not in self._problems:
            self._problems[place, in_chans] = _check_channels(place, in_chans)
        return self._problems[place, in_chans]

    def _is_readable(self, place: Place) -> bool:
        return place[0] in LAYOUTS and place in self.digests


def preview_backbones(cells: list[Cell]) -> dict[Path, Preview]:
    """Return the preview of each backbone that an unfinished cell makes or uses, by the folder of its cell.

    A finished cell has it in its record. Otherwise its config or its checkpoint is read; checkpoints import
    torch, unless they are exports of ours or were read before.
    """
    used = {cell.upstream or cell.dir for cell in cells if not isinstance(cell.result(), ResultRecord)}
    return {cell.dir: _preview(cell) for cell in cells if cell.upstream is None and cell.dir in used}


def _preview(cell: Cell) -> Preview:
    record, chosen = cell.result(), kind(cell.kind)
    try:
        if isinstance(record, ResultRecord):
            spec = BackboneSpec.from_dict(record.backbone_spec) if record.backbone_spec else None
            return Preview(spec, assumptions_of(record))
        if not chosen.describe:
            return Preview()
        spec, assumptions = load_object(chosen.describe)(_build(chosen, cell))
    except UserError as error:
        return Preview(error=error)
    return Preview(spec, tuple(assumptions))


def assumptions_of(record: ResultRecord) -> tuple[str, ...]:
    """Return what was assumed about the checkpoint of a record's backbone."""
    return tuple(record.conversion_report.get("assumptions", ()))


def find_misfits(
    cells: list[Cell], previews: Mapping[Path, Preview], digests: Mapping[Place, str]
) -> dict[Path, UserError]:
    """Return why unfinished cells cannot run on their backbone or their data, by the folder of the cell.

    Data without a digest is missing or not generated yet, and is not read.
    """
    found: dict[Path, UserError] = {}
    known: dict[tuple[str, Path], UserError | None] = {}  # one answer for all seeds
    image_sets = ImageSets(digests)
    for cell in cells:
        preview = previews.get(cell.upstream or cell.dir, Preview())
        if preview.spec is None or isinstance(cell.result(), ResultRecord):
            continue
        key = cell.row, cell.upstream or cell.dir
        if key not in known:
            known[key] = _find_misfit(cell, preview.spec, image_sets)
        problem = known[key]
        if problem:
            found[cell.dir] = problem
    return found


def _find_misfit(cell: Cell, spec: BackboneSpec, image_sets: ImageSets) -> UserError | None:
    chosen = kind(cell.kind)
    place: Any = (chosen.layout, cell.config.get("data"))
    problem = None
    try:
        fit_to_backbone(chosen, _build(chosen, cell), spec, arrays=image_sets.hold_arrays(place))
    except UserError as error:
        problem = error
    if problem is None:
        problem = image_sets.find_problem(place, spec.in_chans)
    if problem is None:
        return None
    what = cell.backbone if cell.upstream is None else f"{cell.backbone} · {cell.row}"
    fix = cell.insert_names(problem.fix)
    return UserError(f"{what}: {problem.given}", expected=problem.expected, fix=fix)


def _expand(place: Place) -> Place:
    return place[0], expand_variables(place[1])


def _check_channels(place: Place, in_chans: int) -> UserError | None:
    try:
        check_channels(*_expand(place), in_chans)
    except UserError as error:
        return error
    return None


def _build(chosen: Kind, cell: Cell) -> Any:
    return build(load_object(chosen.config), cell.config, cell.name)


def fit_to_backbone(chosen: Kind, config: Any, spec: BackboneSpec, *, arrays: bool = False) -> Any:
    """Return the config with the values that depend on the backbone; raise UserError if it cannot run.

    arrays: whether the training images are known to be arrays.
    """
    if chosen.in_chans not in (0, spec.in_chans):
        raise UserError(
            f"a backbone of {spec.in_chans} channels (in_chans)",
            expected=f"{chosen.in_chans}: the images of {chosen.layout} are RGB",
            fix="leave the task or the backbone out: tasks.NAME=null or backbones.NAME=null",
        )
    return load_object(chosen.fit)(config, spec, arrays=arrays) if chosen.fit else config


def read_exported_spec(folder: Path) -> BackboneSpec | None:
    """Return the spec of the backbone that the cell in `folder` made; None if it exported none.

    Raise UserError if the description of the export is damaged.
    """
    path = folder / EXPORT / SPEC_FILE
    if not path.is_file():
        return None
    spec = read_sealed_json(path, required=False).get("spec")
    try:
        return BackboneSpec.from_dict(spec if isinstance(spec, dict) else {})
    except UserError as error:
        raise UserError(f"{path}: {error.given}", expected=error.expected) from error
