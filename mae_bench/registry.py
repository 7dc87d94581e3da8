"""The visible table of job kinds: where each one's config and its run function live, imported only when chosen."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mae_bench.errors import UserError

PACKAGES = ("backbones", "tasks", "leaderboard")  # installed together with mae_bench


@dataclass(frozen=True)
class Kind:
    """One kind of job. `config` and `run` are "module:object"; modules of configs import no framework.

    layout: the layout of the data that it reads ("imagenet", "images" without labels, "coco", "ade20k"; ""
    reads none). emits_backbone: the job ends with `export/` in its folder, which other jobs load as a
    backbone. extra: the optional set of packages that it needs ("" for the core), a key of EXTRAS.
    distributed: several processes can run it together, each on its GPU. of: what its records say under
    `task`, where that is not the layout. version: raised when a change of its code changes its results: cells
    that an older version finished are then run again.
    """

    config: str
    run: str
    layout: str
    emits_backbone: bool = False
    extra: str = ""
    version: int = 1
    distributed: bool = False
    of: str = ""

    @property
    def task(self) -> str:
        """What its records and failures say under `task`."""
        return "pretrain" if self.emits_backbone else self.of or self.layout


KINDS: dict[str, Kind] = {
    "pretrain": Kind(
        "mae_bench.pretrain.config:PretrainConfig",
        "mae_bench.pretrain.job:run",
        "images",
        emits_backbone=True,
        distributed=True,
    ),
    "random": Kind(
        "mae_bench.pretrain.config:RandomConfig", "mae_bench.pretrain.job:run_random", "", emits_backbone=True
    ),
    "supervised": Kind(
        "tasks.imagenet.config:SupervisedConfig",
        "tasks.imagenet.supervised:run",
        "imagenet",
        emits_backbone=True,
        distributed=True,
    ),
    "checkpoint": Kind("backbones.config:CheckpointConfig", "backbones.job:run", "", emits_backbone=True),
    "finetune": Kind(
        "tasks.imagenet.config:FinetuneConfig", "tasks.imagenet.finetune:run", "imagenet", distributed=True
    ),
    "partial_finetune": Kind(
        "tasks.imagenet.config:PartialFinetuneConfig",
        "tasks.imagenet.partial_finetune:run",
        "imagenet",
        distributed=True,
    ),
    "linear_probe": Kind(
        "tasks.imagenet.config:LinearProbeConfig",
        "tasks.imagenet.linear_probe:run",
        "imagenet",
        distributed=True,
        version=2,
    ),
    "knn": Kind("tasks.imagenet.config:KnnConfig", "tasks.imagenet.knn:run", "imagenet", distributed=True),
    "few_shot": Kind(
        "tasks.imagenet.config:FewShotConfig", "tasks.imagenet.few_shot:run", "imagenet", distributed=True
    ),
    "eval_only": Kind(
        "tasks.imagenet.config:EvalOnlyConfig",
        "tasks.imagenet.eval_only:run",
        "imagenet_val",
        distributed=True,
        of="imagenet",
    ),
    "robustness": Kind(
        "tasks.imagenet.config:RobustnessConfig",
        "tasks.imagenet.robustness:run",
        "image_sets",
        distributed=True,
        of="imagenet",
    ),
    "maskrcnn": Kind("tasks.coco.config:MaskRCNNConfig", "tasks.coco.maskrcnn:run", "coco", extra="coco"),
    "upernet": Kind(
        "tasks.ade20k.config:UPerNetConfig", "tasks.ade20k.upernet:run", "ade20k", extra="ade20k"
    ),
}


@dataclass(frozen=True)
class Extra:
    """An optional set of packages: the modules that must be there, what they serve, and the command that installs them.

    compiled: modules of it that need libraries of the system, which only an import shows.
    """

    modules: tuple[str, ...]
    serves: str
    command: str
    compiled: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """The modules that are not there; none of them is imported."""
        return [name for name in self.modules if find_spec(name) is None]


EXTRAS: dict[str, Extra] = {
    "coco": Extra(
        ("detectron2", "pycocotools", "shapely"), "Mask R-CNN on COCO", "make setup   (in a source checkout)"
    ),
    "ade20k": Extra(
        ("mmseg", "mmengine", "mmcv"),
        "UperNet on ADE20K",
        'make setup   (or: python -m pip install "mae_bench[ade20k]")',
        compiled=("cv2",),
    ),
    "arrow": Extra(("pyarrow",), "Arrow and Parquet sets", 'python -m pip install "mae_bench[arrow]"'),
}


def kind(name: str) -> Kind:
    """The kind of that name; UserError lists the known ones."""
    try:
        return KINDS[name]
    except (KeyError, TypeError):  # TypeError: a list or a mapping in the place of a name
        raise UserError(f"unknown job kind {name!r}", expected=f"one of {', '.join(KINDS)}") from None


def load_object(path: str) -> Any:
    """Import "module:object"."""
    module, _, name = path.partition(":")
    check_not_hidden(module.partition(".")[0])
    return getattr(import_module(module), name)


def check_not_hidden(package: str) -> None:
    """Raise UserError if another module of the same name hides a package of ours.

    For example a tasks.py in the folder of a script, which Python searches first.
    """
    root = Path(__file__).resolve().parent.parent
    try:
        spec = find_spec(package) if package in PACKAGES else None
    except ValueError:  # a loaded module without a spec
        spec = None
    if spec is None:
        return
    place = Path(spec.origin or next(iter(spec.submodule_search_locations or ()), ""))
    if root / package not in (place.resolve(), place.resolve().parent):
        raise UserError(
            f"{place} hides the package {package!r} of mae_bench",
            expected=f"{root / package}",
            fix="rename it, or start Python in another folder and without it in PYTHONPATH",
        )
