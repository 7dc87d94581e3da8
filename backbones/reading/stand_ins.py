"""List the classes that checkpoints may name besides tensors, and the plain or inert value each becomes."""

import argparse
import math
import struct
import warnings
from collections import OrderedDict
from typing import Any

import torch

NUMBERS = {  # numpy's name of a type -> the letter of `struct`, and torch's type
    "f2": ("e", torch.float16),
    "f4": ("f", torch.float32),
    "f8": ("d", torch.float64),
    "b1": ("?", torch.bool),
    "i1": ("b", torch.int8),
    "i2": ("h", torch.int16),
    "i4": ("i", torch.int32),
    "i8": ("q", torch.int64),
    "u1": ("B", torch.uint8),
    "u2": ("H", torch.uint16),
    "u4": ("I", torch.uint32),
    "u8": ("Q", torch.uint64),
}


class NotBuilt:
    """Stand-in for an object that is not built; none of its content is kept."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Stored:
    """Stand-in that keeps the arguments and the state of an object as stored in the file."""

    def __init__(self, *args: Any):
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class StoredDtype(Stored):
    """numpy.dtype: its first argument is its name (f8, i4, ...), its state is (version, byte order, ...)."""

    @property
    def name(self) -> str:
        """The name; ValueError for anything but plain little-endian numbers."""
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "<"
        if not self.args or self.args[0] not in NUMBERS or order not in ("<", "|"):
            raise ValueError("a numpy type other than plain little-endian numbers")
        return str(self.args[0])


class StoredArray(Stored):
    """numpy.ndarray: its state is (version, shape, dtype, whether in Fortran order, bytes)."""

    def tensor(self) -> torch.Tensor:
        """Return the array as a tensor; ValueError for Fortran order, other types or missing bytes."""
        match self.state:
            case (_, tuple() as shape, StoredDtype() as dtype, False, bytes() as raw):
                letter, torch_type = NUMBERS[dtype.name]
                if len(raw) == math.prod(shape) * struct.calcsize(letter) > 0:
                    with (
                        warnings.catch_warnings()
                    ):  # the buffer is read-only: arrays may share one bytes object
                        warnings.simplefilter("ignore")
                        return torch.frombuffer(raw, dtype=torch_type).reshape(shape)
        raise ValueError("a numpy array that does not hold plain numbers")


def number(dtype: Any = None, raw: Any = None) -> Any:
    """Return a numpy scalar as a Python number; anything else (a string, a date) is not built."""
    try:
        return struct.unpack("<" + NUMBERS[dtype.name][0], raw)[0]
    except (AttributeError, TypeError, ValueError, struct.error):
        return NotBuilt()


def array(*_: Any) -> StoredArray:
    """Return numpy's empty array, whose state follows in the file."""
    return StoredArray()


def mapping(*args: Any) -> OrderedDict[Any, Any]:
    """Return a dictionary subclass as a plain dictionary; a default factory is dropped."""
    return OrderedDict(args[0]) if args and isinstance(args[0], dict) else OrderedDict()


_ARGS = "training scripts save their command line as `args`; it only holds values"
_CONFIG = "configuration of SimMIM, Swin (yacs) and detectron2 (fvcore), a dictionary"
_MM_CONFIG = "configuration of mmengine and mmcv 1, a dictionary, and the class it derives from"
_LIGHTNING = "Lightning's `hyper_parameters` in versions 1 and 2, a dictionary"
_DEFAULTDICT = "dictionary of hydra and of optimizers, without its default factory"
_CALLBACK = "old Lightning versions name their callbacks by class; not built"
_HISTORY = "mmengine's `message_hub` keeps the losses of a training; not built"
_METHOD = "HistoryBuffer names its own methods this way; never called"
_PATH = "folders in `args`; no path is created"
_NUMPY = "numpy scalars (epochs, scores) and arrays (histories of losses); numpy is not called"
_OMEGACONF = "hydra's configuration in Lightning files (solo-learn, lightly); not built"
_INERT = "named inside such configurations and histories; only a name, never called"
_OMEGACONF_NODES = ("Any", "String", "Integer", "Float", "Boolean", "Path", "Enum")

# Name in the file -> what it is read as, and why. A file that names anything else is refused (tensors aside).
ALLOWED: dict[str, tuple[Any, str]] = {
    "argparse.Namespace": (argparse.Namespace, _ARGS),
    "yacs.config.CfgNode": (OrderedDict, _CONFIG),
    "fvcore.common.config.CfgNode": (OrderedDict, _CONFIG),
    "mmengine.config.config.ConfigDict": (mapping, _MM_CONFIG),
    "mmcv.utils.config.ConfigDict": (mapping, _MM_CONFIG),
    "addict.addict.Dict": (mapping, _MM_CONFIG),
    "pytorch_lightning.utilities.parsing.AttributeDict": (OrderedDict, _LIGHTNING),
    "lightning_fabric.utilities.data.AttributeDict": (OrderedDict, _LIGHTNING),
    "lightning.fabric.utilities.data.AttributeDict": (OrderedDict, _LIGHTNING),
    "collections.defaultdict": (mapping, _DEFAULTDICT),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": (NotBuilt, _CALLBACK),
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping": (NotBuilt, _CALLBACK),
    "mmengine.logging.history_buffer.HistoryBuffer": (NotBuilt, _HISTORY),
    "builtins.getattr": (NotBuilt, _METHOD),
    "pathlib.PosixPath": (NotBuilt, _PATH),
    "pathlib.WindowsPath": (NotBuilt, _PATH),
    "numpy.dtype": (StoredDtype, _NUMPY),
    "numpy.ndarray": (StoredArray, _NUMPY),
    "numpy.core.multiarray.scalar": (number, _NUMPY),  # numpy 1
    "numpy.core.multiarray._reconstruct": (array, _NUMPY),
    "numpy._core.multiarray.scalar": (number, _NUMPY),  # numpy 2
    "numpy._core.multiarray._reconstruct": (array, _NUMPY),
    "omegaconf.dictconfig.DictConfig": (NotBuilt, _OMEGACONF),
    "omegaconf.listconfig.ListConfig": (NotBuilt, _OMEGACONF),
    "omegaconf.base.ContainerMetadata": (NotBuilt, _OMEGACONF),
    "omegaconf.base.Metadata": (NotBuilt, _OMEGACONF),
    **{f"omegaconf.nodes.{kind}Node": (NotBuilt, _OMEGACONF) for kind in _OMEGACONF_NODES},
    "builtins.list": (NotBuilt, _INERT),
    "builtins.dict": (NotBuilt, _INERT),
    "builtins.int": (NotBuilt, _INERT),
    "builtins.float": (NotBuilt, _INERT),
    "builtins.str": (NotBuilt, _INERT),
    "builtins.bool": (NotBuilt, _INERT),
    "builtins.tuple": (NotBuilt, _INERT),
    "typing.Any": (NotBuilt, _INERT),
}
