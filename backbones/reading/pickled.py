"""Scan a pickle before it is read, for what it names, builds and needs, without calling anything."""

import _compat_pickle
import math
import pickletools
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from backbones.reading.stand_ins import ALLOWED, NotBuilt, Stored, StoredArray, mapping

# Names in a torch.save file: storages and their bytes per element, the calls that build tensors from them,
# and containers.
STORAGES = {
    "torch.FloatStorage": 4,
    "torch.DoubleStorage": 8,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
}
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETER = "torch._utils._rebuild_parameter"
DICTIONARIES = {"collections.OrderedDict", "collections.Counter"} | {
    name for name, (stand_in, _) in ALLOWED.items() if stand_in in (OrderedDict, mapping)
}
COLLECTIONS = ("torch.Size", "builtins.set")
VALUES = (*COLLECTIONS, *DICTIONARIES, "torch.device", "_codecs.encode")
UNUSUAL = {  # the calls that build tensors that are not plain numbers -> what they are
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (meta)",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_tensor_v3": "a tensor of an unsupported type (float8 or unsigned)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a custom class",
    "torch._tensor._rebuild_from_type_v2": "a tensor of a custom class",
}
DTYPES = (
    "torch.float32",
    "torch.float64",
    "torch.float16",
    "torch.bfloat16",
    "torch.int64",
    "torch.int32",
    "torch.int16",
    "torch.int8",
    "torch.uint8",
    "torch.bool",
    "torch.complex64",
    "torch.complex128",
)
# Objects whose content is not kept: omegaconf's, for example, refer to their parents.
UNKEPT = {name for name, (stand_in, _) in ALLOWED.items() if stand_in is NotBuilt}
NAMES = {*ALLOWED, *STORAGES, *TENSORS, PARAMETER, *VALUES, *DTYPES}

MAX_DEPTH = 100  # of nested containers; about 10 in files as libraries write them
MAX_DIMENSIONS = 64
MAX_KEY = 1 << 60  # absolute value of an integer key
# Memory a pickle may need, in bytes: BASE, plus INFLATION per byte of the file. COSTS are estimates per
# instruction.
BASE = 32 << 20
INFLATION = 2
COPIED = (
    100  # per part of a container that is copied: an element of a set, half an item of an ordered dictionary
)
COSTS = {
    "REDUCE": 500,
    "NEWOBJ": 500,
    "BINPERSID": 400,
    "BUILD": 200,
    "EMPTY_SET": 500,
    "EMPTY_DICT": 400,
    "EMPTY_LIST": 400,
    "EMPTY_TUPLE": 300,
    "TUPLE": 400,
    "TUPLE1": 300,
    "TUPLE2": 300,
    "TUPLE3": 300,
    "GLOBAL": 300,
    "STACK_GLOBAL": 300,
    "BINPUT": 60,
    "LONG_BINPUT": 60,
    "MEMOIZE": 60,
    "MARK": 150,
}
DEFAULT_COST = 32
LEAVES = {
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINSTRING",
    "SHORT_BINUNICODE",
    "BINBYTES",
    "SHORT_BINBYTES",
}


class Refused(Exception):
    """The pickle needs more than reading as data; names: the unknown classes and functions, if any."""

    def __init__(self, what: str, names: Iterable[str] = ()):
        super().__init__(what)
        self.names = tuple(names)


@dataclass(slots=True, eq=False)
class Node:
    """A value that unpickling would build.

    kind: list, tuple, dict, set, global, storage, tensor or object.
    parts: elements; of a dict keys and values in turn; of an object its arguments, then its states.
    about: the name of a global or object; of a storage its bytes and bytes per element.
    """

    kind: str
    parts: list[Any] = field(default_factory=list)
    about: Any = None


class _Scanner:
    """A pickle machine whose stack holds descriptions. budget: bytes that the built values may need."""

    def __init__(self, budget: int, records: Mapping[str, int] | None, size: int):
        self.budget, self.records, self.size = budget, records, size
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.unknown: dict[str, None] = {}  # names that are not allowed, in file order
        self.storages: dict[Any, int] = {}
        self.claimed = 0  # bytes of all storages
        self.num_values = 0  # an upper bound

    def scan(self, stream: IO[bytes]) -> Any:
        """Return a description of the pickled value."""
        for opcode, arg, _ in pickletools.genops(stream):
            text = sys.getsizeof(arg) if isinstance(arg, str | bytes) else 0
            self.pay(COSTS.get(opcode.name, DEFAULT_COST) + text)
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, arg)
        raise Refused("a pickle without an end")

    def pay(self, cost: int) -> None:
        """Subtract bytes from the budget; raise Refused if it is exhausted."""
        self.num_values += 1
        self.budget -= cost
        if self.budget < 0:
            raise Refused("a pickle that would take far more memory than its bytes")

    def step(self, name: str, arg: Any) -> None:
        """Apply one instruction."""
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
            parts = self.take_to_mark()
            self.stack.append(Node("tuple", parts))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif name in ("APPEND", "APPENDS"):
            self.extend("list", self.take(1) if name == "APPEND" else self.take_to_mark())
        elif name in ("SETITEM", "SETITEMS"):
            items = self.take(2) if name == "SETITEM" else self.take_to_mark()
            _check_keys(items[::2])
            self.extend("dict", items)
        elif name == "GLOBAL":
            stack.append(self.find_global(*arg.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self.find_global(*self.take(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            function, args = self.take(2)
            self.stack.append(self.call(function, args))
        elif name == "BUILD":
            self.build(*self.take(1))
        elif name == "BINPERSID":
            stack.append(self.find_storage(*self.take(1)))
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"a pickle with the instruction {name}, which torch.save does not write")

    def take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise Refused("a pickle that takes from an empty stack")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def take_to_mark(self) -> list[Any]:
        parts, self.stack = self.stack, self.marks.pop()
        return parts

    def extend(self, kind: str, parts: list[Any]) -> None:
        target = self.stack[-1]
        # An object of an unknown class may be filled: the file is refused anyway, with all unknown names.
        if target.kind != kind and not (target.kind == "object" and self.unknown):
            raise Refused(f"a pickle that fills a {target.kind} as a {kind}")
        target.parts.extend(parts)

    def find_global(self, module: Any, name: Any) -> Node:
        """Return a class or function by its Python 3 name; collect unknown names to report them all."""
        in_python_3 = _compat_pickle.IMPORT_MAPPING.get(module, module), name
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), in_python_3)
        full = f"{module}.{name}"
        if full not in NAMES:
            self.unknown[full[:200]] = None
        return Node("global", about=full)

    def call(self, function: Any, args: Any) -> Node:
        """Describe the result of a call, and pay for its arguments: each of many calls may copy them."""
        if function.kind != "global" or args.kind != "tuple":
            raise Refused("a pickle that calls something other than a function")
        name, parts = function.about, args.parts
        self.pay(sum(_estimate_copy(part) for part in parts))
        if self.unknown:  # refused anyway; the rest is only scanned for other unknown names
            return Node("object", [args], name)
        if name in TENSORS:
            return _tensor(*parts)
        if name == PARAMETER:
            return _parameter(*parts)
        if name in DICTIONARIES:
            return _dictionary(name, parts)
        is_sequence = [getattr(part, "kind", "") for part in parts] in (["list"], ["tuple"])
        if name in STORAGES or (name in COLLECTIONS and not is_sequence):
            raise Refused(f"a pickle that makes a {name} of nothing but a size")
        if name in COLLECTIONS:
            _check_keys(parts[0].parts)
        return Node("object", [args], name)

    def build(self, state: Any) -> None:
        """Add a state to an object, as torch would copy it to the object's attributes."""
        target = self.stack[-1]
        if target.about == "argparse.Namespace" and getattr(state, "kind", "") != "dict":
            raise Refused("a Namespace whose state is not a dictionary")
        if target.kind not in ("object", "dict"):
            raise Refused(f"a pickle that sets the state of a {target.kind}")
        self.pay(COPIED * len(state.parts) if isinstance(state, Node) else 0)
        target.parts.extend([None, state] if target.kind == "dict" else [state])

    def find_storage(self, description: Any) -> Node:
        """Return the storage of a tensor; raise Refused if it claims more bytes than the file has for it."""
        parts = description.parts if description.kind == "tuple" else []
        if len(parts) not in (5, 6) or parts[0] != "storage":
            raise Refused("a pickle that refers to something other than a storage")
        _, kind, key, location, count, *view = parts
        if kind.about not in STORAGES:
            raise Refused("a pickle with a storage of an unknown type")
        is_text = isinstance(key, str) and isinstance(location, str)
        if not is_text or location.startswith("meta") or not _is_count(count):
            raise Refused("a pickle with a storage that has no values")
        nbytes = count * STORAGES[kind.about]
        self.claimed += nbytes if key not in self.storages else 0
        if self.storages.setdefault(key, nbytes) != nbytes or view not in ([], [None]):
            raise Refused(f"a checkpoint that describes its storage {key[:50]!r} in two ways")
        held = self.size if self.records is None else self.records.get(key, 0)
        if nbytes > held or self.claimed > self.size:
            raise Refused(
                f"a checkpoint that claims {nbytes} bytes for its storage {key[:50]!r}, which has {held}"
            )
        return Node("storage", about=(nbytes, STORAGES[kind.about]))


def _estimate_copy(part: Any) -> int:
    return COPIED * len(part.parts) if isinstance(part, Node) else 2 * sys.getsizeof(part)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _dictionary(name: str, parts: list[Any]) -> Node:
    """Describe a dictionary made from none or one; the default factory of a defaultdict is dropped."""
    filled = [part for part in parts if getattr(part, "kind", "") != "global"]
    if len(filled) > 1 or any(getattr(part, "kind", "") != "dict" for part in filled):
        raise Refused(f"a pickle that makes a {name} of something other than a dictionary")
    return Node("dict", list(filled[0].parts) if filled else [], name)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Node:
    if tensor.kind != "tensor" or not isinstance(requires_grad, bool) or hooks.parts:
        raise Refused("a parameter that is not a plain tensor")
    return Node("tensor")


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys that are costly to hash: nested tuples (exponential time), huge numbers (collisions)."""
    if not all(_is_plain_key(key) for key in keys):
        raise Refused("a pickle whose dictionaries have keys that are neither names nor numbers")


def _is_plain_key(key: Any) -> bool:
    if isinstance(key, Node):
        is_name_tuple = (
            key.kind == "tuple" and len(key.parts) < 9 and all(isinstance(p, str) for p in key.parts)
        )
        return is_name_tuple or key.kind == "global"
    if isinstance(key, int):
        return abs(key) < MAX_KEY
    return isinstance(key, str | bytes | None)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Node:
    """Describe a tensor; refuse one with elements outside its storage or shared, or with attachments."""
    if storage.kind != "storage" or size.kind != "tuple" or stride.kind != "tuple":
        raise Refused("a tensor that is not built from a storage")
    shape, steps = size.parts, stride.parts
    are_counts = all(map(_is_count, (offset, *shape, *steps)))
    if not are_counts or len(shape) != len(steps) or len(shape) > MAX_DIMENSIONS:
        raise Refused("a tensor of an impossible shape")
    nbytes, element = storage.about
    last = offset + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    count = math.prod(shape)
    if count * element > nbytes or (count and (last + 1) * element > nbytes) or offset * element > nbytes:
        raise Refused(
            f"a tensor of shape {tuple(shape)} and strides {tuple(steps)} over {nbytes} stored bytes"
        )
    if any(isinstance(part, Node) and part.parts for part in rest):
        raise Refused("a tensor with hooks or other attachments")
    return Node("tensor")


def scan_pickle(
    stream: IO[bytes], file_size: int, records: Mapping[str, int] | None = None
) -> tuple[Any, dict[str, int]]:
    """Scan one pickle of a file; return a description of its value, and the bytes of its storages by key.

    records: bytes of each storage by key, if the file states them (zip archives). Raises Refused, and nothing
    else, for names that are not allowed, for damage, and for what would take more memory, depth or repetition
    than real files do.
    """
    scanner = _Scanner(BASE + INFLATION * file_size, records, file_size)
    try:
        value = scanner.scan(stream)
    except Refused:
        _check_names(scanner)
        raise
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        OverflowError,
        MemoryError,
        EOFError,
    ) as error:
        _check_names(scanner)
        raise Refused(f"a damaged checkpoint: {type(error).__name__}: {str(error)[:100]}") from error
    _check_names(scanner)
    _check_nesting(value, scanner.num_values)
    return value, scanner.storages


def _check_names(scanner: _Scanner) -> None:
    """Refuse unknown names before any other fault: they may be its cause, and say more."""
    unusual = [UNUSUAL[name] for name in scanner.unknown if name in UNUSUAL]
    if unusual:
        raise Refused(f"a checkpoint with {unusual[0]}")
    if scanner.unknown:
        raise Refused("a pickle that builds more than data", scanner.unknown)


def _check_nesting(root: Any, num_values: int) -> None:
    """Refuse values that contain themselves, nest too deep, or repeat so often that a walk never ends."""
    sizes: dict[int, tuple[int, int]] = {}  # number of values and depth below a node
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
            count = 1 + len(node.parts) + sum(count for count, _ in below)
            depth = 1 + max((depth for _, depth in below), default=0)
            sizes[id(node)] = (count, depth)
            if count > 100_000 + 10 * num_values or depth > MAX_DEPTH:
                raise Refused("a pickle whose values repeat or nest without end")
            continue
        open_nodes.add(id(node))
        if any(id(child) in open_nodes for child in children):
            raise Refused("a pickle with a value that contains itself")
        stack.append((node, True))
        stack += [(child, False) for child in children]


def build_value(node: Any, built: dict[int, Any] | None = None) -> Any:
    """Build the value of a pickle without storages (detectron2's .pkl); numpy arrays become tensors.

    built: what was built for each node, so that shared values are built once.
    """
    built = {} if built is None else built
    if not isinstance(node, Node):
        return node
    if id(node) not in built:
        built[id(node)] = _build(
            node, [build_value(part, built) for part in node.parts if node.about not in UNKEPT]
        )
    return built[id(node)]


def _build(node: Node, parts: list[Any]) -> Any:
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
