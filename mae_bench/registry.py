"""The table of job kinds: where the config and the run function of each are, imported only when used."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mae_bench.errors import UserError

PACKAGES = ("backbones", "tasks", "leaderboard")  # installed together with mae_bench


@dataclass(frozen=True)
class Kind:
    """One kind of job.

    Attributes:
        config, run: "module:object"; the modules of configs import no framework.
        layout: the layout of the data that it reads: "imagenet", "images" (without labels), "coco", "ade20k",
            ...; "" if it reads none.
        emits_backbone: whether the job writes `export/`, which other jobs load as a backbone.
        extra: the optional packages that it needs, a key of EXTRAS; "" for the core.
        version: incremented when a change of the code changes results; cells finished by an older version run
            again.
        distributed: whether several processes, one per GPU, can run it together.
        of: the `task` of its records, where it differs from the layout.
        describe: "module:object" of a function config -> (BackboneSpec or None, assumptions), which describes
            the backbone that the job will make; "" if nothing is known before.
        fit: "module:object" of a function (config, BackboneSpec, arrays=BOOL) -> config, which fills in what
            depends on the backbone, or raises UserError if it cannot run on it; "" if nothing does. arrays:
            whether the training images are known to be arrays. Its module imports no framework.
        in_chans: number of channels of its data; 0 for any.
    """

    config: str
    run: str
    layout: str
    emits_backbone: bool = False
    extra: str = ""
    version: int = 1
    distributed: bool = False
    of: str = ""
    describe: str = ""
    fit: str = ""
    in_chans: int = 0

    @property
    def task(self) -> str:
        """The `task` of its records and failures."""
        return "pretrain" if self.emits_backbone else self.of or self.layout


DESCRIBE_MODEL = "mae_bench.pretrain.config:describe_model"
FIT_IMAGENET = "tasks.imagenet.fit:fit"

KINDS: dict[str, Kind] = {
    "pretrain": Kind(
        "mae_bench.pretrain.config:PretrainConfig",
        "mae_bench.pretrain.job:run",
        "images",
        emits_backbone=True,
        distributed=True,
        describe=DESCRIBE_MODEL,
    ),
    "random": Kind(
        "mae_bench.pretrain.config:RandomConfig",
        "mae_bench.pretrain.job:run_random",
        "",
        emits_backbone=True,
        describe=DESCRIBE_MODEL,
    ),
    "supervised": Kind(
        "tasks.imagenet.config:SupervisedConfig",
        "tasks.imagenet.supervised:run",
        "imagenet",
        emits_backbone=True,
        distributed=True,
        describe=DESCRIBE_MODEL,
        fit=FIT_IMAGENET,
    ),
    "checkpoint": Kind(
        "backbones.config:CheckpointConfig",
        "backbones.job:run",
        "",
        emits_backbone=True,
        describe="backbones.describe:describe",
    ),
    "finetune": Kind(
        "tasks.imagenet.config:FinetuneConfig",
        "tasks.imagenet.finetune:run",
        "imagenet",
        distributed=True,
        fit=FIT_IMAGENET,
    ),
    "partial_finetune": Kind(
        "tasks.imagenet.config:PartialFinetuneConfig",
        "tasks.imagenet.partial_finetune:run",
        "imagenet",
        distributed=True,
        fit=FIT_IMAGENET,
    ),
    "linear_probe": Kind(
        "tasks.imagenet.config:LinearProbeConfig",
        "tasks.imagenet.linear_probe:run",
        "imagenet",
        distributed=True,
        version=2,
        fit=FIT_IMAGENET,
    ),
    "knn": Kind(
        "tasks.imagenet.config:KnnConfig",
        "tasks.imagenet.knn:run",
        "imagenet",
        distributed=True,
        fit=FIT_IMAGENET,
    ),
    "few_shot": Kind(
        "tasks.imagenet.config:FewShotConfig",
        "tasks.imagenet.few_shot:run",
        "imagenet",
        distributed=True,
        fit=FIT_IMAGENET,
    ),
    "eval_only": Kind(
        "tasks.imagenet.config:EvalOnlyConfig",
        "tasks.imagenet.eval_only:run",
        "imagenet_val",
        distributed=True,
        of="imagenet",
        fit=FIT_IMAGENET,
    ),
    "robustness": Kind(
        "tasks.imagenet.config:RobustnessConfig",
        "tasks.imagenet.robustness:run",
        "image_sets",
        distributed=True,
        of="imagenet",
        fit=FIT_IMAGENET,
    ),
    "maskrcnn": Kind(
        "tasks.coco.config:MaskRCNNConfig",
        "tasks.coco.maskrcnn:run",
        "coco",
        extra="coco",
        fit="tasks.coco.fit:fit",
        in_chans=3,
    ),
    "upernet": Kind(
        "tasks.ade20k.config:UPerNetConfig",
        "tasks.ade20k.upernet:run",
        "ade20k",
        extra="ade20k",
        fit="tasks.ade20k.fit:fit",
        in_chans=3,
    ),
}


@dataclass(frozen=True)
class Extra:
    """A set of optional packages.

    Attributes:
        modules: the modules that must be installed.
        serves: what they are for.
        command: the command that installs them.
        compiled: those of the modules that need system libraries, which only an import can check.
    """

    modules: tuple[str, ...]
    serves: str
    command: str
    compiled: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Return the modules that are not installed, without importing any."""
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
    """Return the kind of that name. Raise UserError with the known names for an unknown one."""
    try:
        return KINDS[name]
    except (KeyError, TypeError):  # TypeError: a list or a mapping instead of a name
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
