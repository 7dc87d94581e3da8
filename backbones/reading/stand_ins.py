"""What is read in the place of the classes that checkpoints name beside their tensors: plain values, or inert stand-ins."""

import argparse
import math
import struct
import warnings
from collections import OrderedDict
from typing import Any

import torch

NUMBERS = {  # numpy's name of a type: the letter of `struct`, and torch's type
    "f2": ("e", torch.float16), "f4": ("f", torch.float32), "f8": ("d", torch.float64), "b1": ("?", torch.bool),
    "i1": ("b", torch.int8), "i2": ("h", torch.int16), "i4": ("i", torch.int32), "i8": ("q", torch.int64),
    "u1": ("B", torch.uint8), "u2": ("H", torch.uint16), "u4": ("I", torch.uint32), "u8": ("Q", torch.uint64),
}  # fmt: skip


class NotBuilt:
    """Stands for an object that was not built; nothing of it is kept."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Stored:
    """Holds the arguments and the state of an object as they stand in the file."""

    def __init__(self, *args: Any):
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class StoredDtype(Stored):
    """numpy.dtype: its arguments begin with its name (f8, i4 ...); its state is (version, byte order, ...)."""

    @property
    def name(self) -> str:
        """ValueError for anything but plain numbers in little-endian order."""
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "<"
        if not self.args or self.args[0] not in NUMBERS or order not in ("<", "|"):
            raise ValueError("a type of numpy that is none of plain little-endian numbers")
        return str(self.args[0])


class StoredArray(Stored):
    """numpy.ndarray: its state is (version, shape, dtype, whether in Fortran's order, bytes)."""

    def tensor(self) -> torch.Tensor:
        """The array; ValueError for what is in Fortran's order, no numbers, or of other bytes than its shape says."""
        match self.state:
            case (_, tuple() as shape, StoredDtype() as dtype, False, bytes() as raw):
                letter, torch_type = NUMBERS[dtype.name]
                if len(raw) == math.prod(shape) * struct.calcsize(letter) > 0:
                    with (
                        warnings.catch_warnings()
                    ):  # of memory that must not be written to: one text may serve many arrays
                        warnings.simplefilter("ignore")
                        return torch.frombuffer(raw, dtype=torch_type).reshape(shape)
        raise ValueError("an array of numpy that holds no plain numbers")


def number(dtype: Any = None, raw: Any = None) -> Any:
    """numpy's scalar as Python's number; what is none (a string, a date) is not built."""
    try:
        return struct.unpack("<" + NUMBERS[dtype.name][0], raw)[0]
    except (AttributeError, TypeError, ValueError, struct.error):
        return NotBuilt()


def array(*_: Any) -> StoredArray:
    """numpy's empty array, whose state comes next."""
    return StoredArray()


def mapping(*args: Any) -> OrderedDict[Any, Any]:
    """A dictionary of a class of its own as a plain one (what makes its missing values is left out)."""
    return OrderedDict(args[0]) if args and isinstance(args[0], dict) else OrderedDict()


_NUMPY = "numpy's numbers (epochs, scores) and arrays (mmengine's history of losses); numpy is not called"
_OMEGACONF = "hydra's configuration in Lightning files (solo-learn, lightly); not built"
_INERT = "named inside such configurations and histories; a name only, never called"

# Name in the file -> what it is read as, and why. Of what is not here (and no tensor of torch's), the file is refused.
ALLOWED: dict[str, tuple[Any, str]] = {
    "argparse.Namespace": (argparse.Namespace, "training scripts save their command line as `args`; it only holds values"),
    "yacs.config.CfgNode": (OrderedDict, "SimMIM and Swin save their configuration, a dictionary, as `config`"),
    "fvcore.common.config.CfgNode": (OrderedDict, "detectron2's configuration, a dictionary"),
    "mmengine.config.config.ConfigDict": (mapping, "mmengine's configuration, a dictionary"),
    "mmcv.utils.config.ConfigDict": (mapping, "mmcv 1's configuration, a dictionary"),
    "addict.addict.Dict": (mapping, "what ConfigDict is made of"),
    "pytorch_lightning.utilities.parsing.AttributeDict": (OrderedDict, "Lightning's `hyper_parameters`, a dictionary"),
    "lightning_fabric.utilities.data.AttributeDict": (OrderedDict, "the same in Lightning 2"),
    "lightning.fabric.utilities.data.AttributeDict": (OrderedDict, "the same in Lightning 2's other package"),
    "collections.defaultdict": (mapping, "hydra's and optimizers' dictionaries, without what makes their missing values"),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": (NotBuilt, "old Lightning names its callbacks by class"),
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping": (NotBuilt, "the same"),
    "mmengine.logging.history_buffer.HistoryBuffer": (NotBuilt, "mmengine's `message_hub` keeps the losses of a training"),
    "builtins.getattr": (NotBuilt, "by which HistoryBuffer names its own methods; never called"),
    "pathlib.PosixPath": (NotBuilt, "folders in `args`; no path is made of them"),
    "pathlib.WindowsPath": (NotBuilt, "the same"),
    "numpy.dtype": (StoredDtype, _NUMPY),
    "numpy.ndarray": (StoredArray, _NUMPY),
    **{f"numpy.{core}.multiarray.{what}": (made, _NUMPY)
       for core in ("core", "_core") for what, made in {"scalar": number, "_reconstruct": array}.items()},  # numpy 1 and 2
    **{f"omegaconf.{name}": (NotBuilt, _OMEGACONF)
       for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata",
                    *(f"nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path", "Enum")))},
    **{f"builtins.{name}": (NotBuilt, _INERT) for name in ("list", "dict", "int", "float", "str", "bool", "tuple")},
    "typing.Any": (NotBuilt, _INERT),
}  # fmt: skip
