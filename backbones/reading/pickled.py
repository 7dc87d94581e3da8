"""Looks through a pickle before it is read: what it names, builds and needs; nothing of it is called and no size is believed."""

import _compat_pickle
import math
import pickletools
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from backbones.reading.stand_ins import ALLOWED, NotBuilt, Stored, StoredArray, mapping

# What a file of torch.save is made of: bytes of an element in each kind of storage, and the calls that make tensors of them.
BYTES = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
         "ComplexFloat": 8, "ComplexDouble": 16}  # fmt: skip
STORAGES = {f"torch.{name}Storage": size for name, size in BYTES.items()}
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETER = "torch._utils._rebuild_parameter"
DICTIONARIES = {"collections.OrderedDict", "collections.Counter"} | {
    name for name, (made, _) in ALLOWED.items() if made in (OrderedDict, mapping)
}
COLLECTIONS = ("torch.Size", "builtins.set")
VALUES = (*COLLECTIONS, *DICTIONARIES, "torch.device", "_codecs.encode")
UNUSUAL = {  # tensors that are no plain numbers: how they are built, and what they are
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (meta)",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_tensor_v3": "a tensor of an unusual type (float8 or unsigned)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
    "torch._tensor._rebuild_from_type_v2": "a tensor of a class of its own",
}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
          "complex64", "complex128")  # fmt: skip
UNKEPT = {
    name for name, (made, _) in ALLOWED.items() if made is NotBuilt
}  # omegaconf's point at their parents, for example
NAMES = {*ALLOWED, *STORAGES, *TENSORS, PARAMETER, *VALUES, *(f"torch.{name}" for name in DTYPES)}

MAX_DEPTH = 100  # of containers in each other; honest files have about 10
COPIED = 100  # bytes that a part of a container may take in a copy: an element of a set, half an item of an ordered dictionary
BASE = 32 << 20  # bytes that any file may need, beyond what its size allows
INFLATION = 2  # bytes of Python objects over bytes of the file, at most
COSTS = {"REDUCE": 500, "NEWOBJ": 500, "BINPERSID": 400, "BUILD": 200, "EMPTY_SET": 500, "EMPTY_DICT": 400, "EMPTY_LIST": 400,
         "EMPTY_TUPLE": 300, "TUPLE": 400, "TUPLE1": 300, "TUPLE2": 300, "TUPLE3": 300, "GLOBAL": 300, "STACK_GLOBAL": 300,
         "BINPUT": 60, "LONG_BINPUT": 60, "MEMOIZE": 60, "MARK": 150}  # fmt: skip
LEAVES = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
          "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}  # fmt: skip


class Refused(Exception):
    """The pickle wants what is not read as data. names: the classes and functions that it wants, if these are why."""

    def __init__(self, what: str, names: Iterable[str] = ()):
        super().__init__(what)
        self.names = tuple(names)


@dataclass(slots=True, eq=False)
class Node:
    """A value that would be built.

    kind: list, tuple, dict (parts: keys and values in turn), set, global, storage, tensor, or object (parts: its arguments and
    then its states). about: a name, or of a storage its bytes and those of an element.
    """

    kind: str
    parts: list[Any] = field(default_factory=list)
    about: Any = None


class _Reader:
    """A pickle machine whose stack holds descriptions. budget: bytes that the built values may take."""

    def __init__(self, budget: int, records: Mapping[str, int] | None, size: int):
        self.budget, self.records, self.size = budget, records, size
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.strange: dict[str, None] = {}  # names that are not allowed, in the order of the file
        self.storages: dict[Any, int] = {}
        self.claimed = 0  # bytes of all storages
        self.made = 0  # values, about

    def read(self, stream: IO[bytes]) -> Any:
        for opcode, arg, _ in pickletools.genops(stream):
            self.pay(COSTS.get(opcode.name, 32) + (sys.getsizeof(arg) if isinstance(arg, str | bytes) else 0))
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, arg)
        raise Refused("a pickle without an end")

    def pay(self, cost: int) -> None:
        self.made += 1
        self.budget -= cost
        if self.budget < 0:
            raise Refused("a pickle that would take far more memory than its bytes")

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        if name in LEAVES:
            stack.append(arg if name not in ("NEWTRUE", "NEWFALSE") else name == "NEWTRUE")
        elif name == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif name.startswith("EMPTY_"):
            stack.append(Node(name.removeprefix("EMPTY_").lower()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(Node("tuple", self.take(int(name[-1]))))
        elif name == "TUPLE":
            parts = self.since_mark()
            self.stack.append(Node("tuple", parts))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif name in ("APPEND", "APPENDS"):
            self.extend("list", self.take(1) if name == "APPEND" else self.since_mark())
        elif name in ("SETITEM", "SETITEMS"):
            items = self.take(2) if name == "SETITEM" else self.since_mark()
            _check_keys(items[::2])
            self.extend("dict", items)
        elif name == "GLOBAL":
            stack.append(self.named(*arg.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self.named(*self.take(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            function, args = self.take(2)
            self.stack.append(self.called(function, args))
        elif name == "BUILD":
            self.build(*self.take(1))
        elif name == "BINPERSID":
            stack.append(self.storage(*self.take(1)))
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"a pickle with the instruction {name}, which torch.save does not write")

    def take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise Refused("a pickle that takes from an empty stack")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def since_mark(self) -> list[Any]:
        parts, self.stack = self.stack, self.marks.pop()
        return parts

    def extend(self, kind: str, parts: list[Any]) -> None:
        if self.stack[-1].kind not in (kind, "object") or (
            self.stack[-1].kind == "object" and not self.strange
        ):
            raise Refused(f"a pickle that fills a {self.stack[-1].kind} as a {kind}")
        self.stack[-1].parts.extend(parts)

    def named(self, module: Any, name: Any) -> Node:
        """The Python 3 name of a class or function; a strange one is kept, so that all of them can be told."""
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        )
        if (full := f"{module}.{name}") not in NAMES:
            self.strange[full[:200]] = None
        return Node("global", about=full)

    def called(self, function: Any, args: Any) -> Node:
        """What a call would give. Its arguments are paid for: a call may copy them, and the same ones serve many calls."""
        if function.kind != "global" or args.kind != "tuple":
            raise Refused("a pickle that calls what is no function")
        name, parts = function.about, args.parts
        self.pay(
            sum(
                COPIED * len(part.parts) if isinstance(part, Node) else 2 * sys.getsizeof(part)
                for part in parts
            )
        )
        if (
            self.strange
        ):  # refused in any case; the rest is looked through for the names of what else it wants
            return Node("object", [args], name)
        if name in TENSORS:
            return _tensor(*parts)
        if name == PARAMETER:
            return _parameter(*parts)
        if name in DICTIONARIES:
            return _dictionary(name, parts)
        if name in STORAGES or (
            name in COLLECTIONS and [getattr(part, "kind", "") for part in parts] not in (["list"], ["tuple"])
        ):
            raise Refused(f"a pickle that makes a {name} of nothing but a size")
        if name in COLLECTIONS:
            _check_keys(parts[0].parts)
        return Node("object", [args], name)

    def build(self, state: Any) -> None:
        """The state of an object, which torch would spread over its attributes."""
        target = self.stack[-1]
        if target.about == "argparse.Namespace" and getattr(state, "kind", "") != "dict":
            raise Refused("a Namespace whose state is no dictionary")
        if target.kind not in ("object", "dict"):
            raise Refused(f"a pickle that sets the state of a {target.kind}")
        self.pay(COPIED * len(state.parts) if isinstance(state, Node) else 0)
        target.parts.extend([None, state] if target.kind == "dict" else [state])

    def storage(self, said: Any) -> Node:
        """The stored bytes that tensors lie in: as many as the file has for them."""
        if said.kind != "tuple" or len(said.parts) not in (5, 6) or said.parts[0] != "storage":
            raise Refused("a pickle that asks for something else than stored numbers")
        _, kind, key, location, count, *view = said.parts
        if kind.about not in STORAGES:
            raise Refused("a pickle with numbers of an unknown type")
        if (
            not isinstance(key, str)
            or not isinstance(location, str)
            or location.startswith("meta")
            or not _is_count(count)
        ):
            raise Refused("a pickle whose numbers lie nowhere")
        nbytes = count * STORAGES[kind.about]
        self.claimed += nbytes if key not in self.storages else 0
        if self.storages.setdefault(key, nbytes) != nbytes or view not in ([], [None]):
            raise Refused(f"a checkpoint that says two things of its stored numbers {key[:50]!r}")
        stands = self.records.get(key, 0) if self.records is not None else self.size
        if nbytes > stands or self.claimed > self.size:
            raise Refused(
                f"a checkpoint that claims {nbytes} bytes for its stored numbers {key[:50]!r}, where it has {stands}"
            )
        return Node("storage", about=(nbytes, STORAGES[kind.about]))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _dictionary(name: str, parts: list[Any]) -> Node:
    """Empty, or of one dictionary. What a defaultdict makes its missing values of is left out."""
    filled = [part for part in parts if getattr(part, "kind", "") != "global"]
    if len(filled) > 1 or any(getattr(part, "kind", "") != "dict" for part in filled):
        raise Refused(f"a pickle that makes a {name} of something else than a dictionary")
    return Node("dict", list(filled[0].parts) if filled else [], name)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Node:
    if tensor.kind != "tensor" or not isinstance(requires_grad, bool) or hooks.parts:
        raise Refused("a parameter that is no plain tensor")
    return Node("tensor")


def _check_keys(keys: Iterable[Any]) -> None:
    """Names and small numbers: the hash of nested tuples takes exponential time, those of huge numbers can be made to collide."""
    for key in keys:
        if isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 60):
            continue
        if (
            isinstance(key, Node)
            and key.kind == "tuple"
            and len(key.parts) < 9
            and all(isinstance(p, str) for p in key.parts)
        ):
            continue
        if not isinstance(key, bytes | None) and not (isinstance(key, Node) and key.kind == "global"):
            raise Refused("a pickle whose dictionaries have keys that are neither names nor numbers")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Node:
    """A tensor whose elements all lie in its storage, each counted once, and nothing attached to it."""
    if storage.kind != "storage" or size.kind != "tuple" or stride.kind != "tuple":
        raise Refused("a tensor that is not built of stored numbers")
    shape, steps = size.parts, stride.parts
    if not all(map(_is_count, (offset, *shape, *steps))) or len(shape) != len(steps) or len(shape) > 64:
        raise Refused("a tensor of an impossible shape")
    nbytes, element = storage.about
    last = offset + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    count = math.prod(shape)
    if count * element > nbytes or (count and (last + 1) * element > nbytes) or offset * element > nbytes:
        raise Refused(
            f"a tensor of shape {tuple(shape)} and strides {tuple(steps)} over {nbytes} stored bytes"
        )
    if any(isinstance(part, Node) and part.parts for part in rest):
        raise Refused("a tensor with hooks or other things attached")
    return Node("tensor")


def scan_pickle(
    stream: IO[bytes], file_size: int, records: Mapping[str, int] | None = None
) -> tuple[Any, dict[str, int]]:
    """Goes through one pickle of a file of `file_size` bytes; gives a description of its value, and its storages' bytes by key.

    records: bytes of each storage by its key, where the file says (zip archives). Refused (and nothing else) for names that are
    not allowed, for what is damaged, and for what would take more memory, depth or repetition than honest files do.
    """
    reader = _Reader(BASE + INFLATION * file_size, records, file_size)
    try:
        value = reader.read(stream)
    except Refused:
        _name_strange(reader)
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
        TypeError,
        OverflowError,
        MemoryError,
        EOFError,
    ) as error:
        _name_strange(reader)
        raise Refused(f"a damaged checkpoint: {type(error).__name__}: {str(error)[:100]}") from error
    _name_strange(reader)
    _measure(value, reader.made)
    return value, reader.storages


def _name_strange(reader: _Reader) -> None:
    """What is not allowed comes before any other fault: it may be the cause, and tells more."""
    if unusual := [UNUSUAL[name] for name in reader.strange if name in UNUSUAL]:
        raise Refused(f"a checkpoint with {unusual[0]}")
    if reader.strange:
        raise Refused("a pickle that builds more than data", reader.strange)


def _measure(root: Any, made: int) -> None:
    """Refuses what contains itself, lies too deep, or repeats its parts so often that whoever walks through it never ends."""
    sizes: dict[int, tuple[int, int]] = {}  # values and depth below a node
    open_nodes: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        if not isinstance(node, Node) or id(node) in sizes:
            continue
        children = [part for part in node.parts if isinstance(part, Node) and part.about not in UNKEPT]
        if done:
            open_nodes.discard(id(node))
            below = [sizes[id(child)] for child in children]
            sizes[id(node)] = (
                1 + len(node.parts) + sum(count for count, _ in below),
                1 + max((d for _, d in below), default=0),
            )
            if sizes[id(node)][0] > 100_000 + 10 * made or sizes[id(node)][1] > MAX_DEPTH:
                raise Refused("a pickle whose values repeat or nest without end")
            continue
        open_nodes.add(id(node))
        if any(id(child) in open_nodes for child in children):
            raise Refused("a pickle with a value that contains itself")
        stack.append((node, True))
        stack += [(child, False) for child in children]


def build_value(node: Any, made: dict[int, Any] | None = None) -> Any:
    """The value that was described by a pickle without stored numbers (detectron2's .pkl): arrays of numpy become tensors.

    made: what was made of each node, so that what stands in many places is made once.
    """
    made = {} if made is None else made
    if isinstance(node, Node) and id(node) not in made:
        made[id(node)] = _make(
            node, [build_value(part, made) for part in node.parts if node.about not in UNKEPT]
        )
    return made[id(node)] if isinstance(node, Node) else node


def _make(node: Node, parts: list[Any]) -> Any:
    if node.kind in ("list", "tuple"):
        return parts if node.kind == "list" else tuple(parts)
    if node.kind == "dict":
        return dict(zip(parts[::2], parts[1::2], strict=True))
    if node.kind != "object" or not parts:
        return NotBuilt()
    args, *states = parts
    if node.about == "_codecs.encode":
        return str(args[0]).encode("latin1")
    value = ALLOWED[node.about][0](*args) if node.about.startswith("numpy.") else NotBuilt()
    if states and isinstance(value, Stored):
        value.__setstate__(states[-1])
    return value.tensor() if isinstance(value, StoredArray) else value
