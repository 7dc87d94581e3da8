"""Build hostile weight files byte by byte; as a program, read them and print the memory each took."""

import gc
import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

MANY = 120_000
COPIES = 9  # so few that their number alone does not show
MAGIC = (
    pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    + pickle.dumps(1001, protocol=2)
    + pickle.dumps({}, protocol=2)
)
GOOD = {
    "dtype": "F32",
    "shape": [4],
    "data_offsets": [0, 16],
}  # the entry of a tensor in a header of safetensors
NO_STORAGES = pickle.dumps([], protocol=2)


def archive(
    data: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> bytes:
    """torch.save's zip archive around a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as target:
        for name, content in {
            "data.pkl": data,
            "byteorder": b"little",
            "version": b"3\n",
            **(records or {}),
        }.items():
            target.writestr(f"archive/{name}", content)
    return out.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(full: str) -> bytes:
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def whole(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def storage(count: int = 4, kind: str = "torch.FloatStorage", key: str = "0", location: str = "cpu") -> bytes:
    return b"(" + text("storage") + name(kind) + text(key) + text(location) + number(count) + b"tQ"


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, stored: bytes = b"") -> bytes:
    inside = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    args = (stored or storage()) + number(offset) + b"".join(inside)
    hooks = b"\x89" + name("collections.OrderedDict") + b")R"
    return name("torch._utils._rebuild_tensor_v2") + b"(" + args + hooks + b"tR"


def in_dictionary(value: bytes) -> bytes:
    return whole(b"}", text("w"), value, b"s")


def bombs() -> Iterator[tuple[str, bytes]]:
    """Pickles that would take memory or time without end, by what they do."""
    for what, op in {
        "sets": b"\x8f",
        "lists": b"]",
        "dictionaries": b"}",
        "tuples": b")",
        "marks": b"(",
        "nothing": b"N",
    }.items():
        yield f"many {what}", whole(b"(", op * MANY, b"t" * (1 + MANY * (what == "marks")))
    yield "many floats", whole(b"(", (b"G" + bytes(8)) * MANY, b"t")
    yield "many long numbers", whole(b"(", (b"\x8a\xff" + b"\x7f" * 255) * 9, b"t")
    yield "deep lists", whole(b"]" * MANY, b"a" * (MANY - 1))
    yield "deep tuples", whole(b")", b"\x85" * MANY)
    yield "nested dictionaries", whole(b"}", (text("a") + b"}") * 5000, b"s" * 5000)
    yield "doubled tuples", whole(b")", *(b"q\x00h\x00\x86" for _ in range(90)))
    yield "doubled tuples as a key", whole(b"}", b")", *(b"q\x00h\x00\x86" for _ in range(90)), b"Ns")
    yield (
        "doubled dictionaries",
        in_dictionary(
            b"}" + b"".join(b"q\x00}" + text("a") + b"h\x00s" + text("b") + b"h\x00s" for _ in range(60))
        ),
    )
    yield "a list in itself", in_dictionary(b"]q\x00h\x00a")
    yield "a list that doubles itself", in_dictionary(b"]q\x00Na" + b"(h\x00h\x00e" * 40)
    yield "a dictionary in itself", whole(b"}q\x00", text("a"), b"h\x00s")
    yield (
        "a text encoded again and again",
        in_dictionary(
            b"("
            + text("x" * 200_000)
            + b"q\x00"
            + b"".join(name("_codecs.encode") + b"h\x00" + text("latin1") + b"\x86R" for _ in range(3000))
            + b"t"
        ),
    )
    state = b"}q\x00(" + b"".join(text(f"a{i}") + b"N" for i in range(40_000)) + b"u"
    yield (
        "a state given again and again",
        in_dictionary(b"(" + state + (name("argparse.Namespace") + b")\x81h\x00b") * COPIES + b"t"),
    )
    for copied in (
        "collections.OrderedDict",
        "collections.Counter",
        "yacs.config.CfgNode",
        "addict.addict.Dict",
    ):
        yield (
            f"copies of {copied}",
            in_dictionary(b"(" + state + (name(copied) + b"h\x00\x85R") * COPIES + b"t"),
        )
    rows = b"](" + b"".join(map(number, range(200_000))) + b"eq\x00"
    for copied in ("torch.Size", "builtins.set"):
        yield (
            f"copies in {copied}",
            in_dictionary(b"(" + rows + (name(copied) + b"h\x00\x85R") * COPIES + b"t"),
        )
    for sized in ("bytearray", "list", "int", "getattr", "dict"):
        yield f"{sized} of a size", in_dictionary(name(f"__builtin__.{sized}") + number(1 << 40) + b"\x85R")
    for sized in (
        "torch.FloatStorage",
        "torch.FloatTensor",
        "torch.Size",
        "torch.UntypedStorage",
        "torch.device",
        "collections.Counter",
    ):
        yield f"{sized} of a size", in_dictionary(name(sized) + number(1 << 40) + b"\x85R")
    yield (
        "numbers that collide",
        whole(b"}(", *(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 20_000)), b"u"),
    )
    for core in ("core", "_core"):
        shape = number(1 << 40) + b"\x85"
        yield (
            f"an array of numpy.{core}",
            in_dictionary(
                name(f"numpy.{core}.multiarray._reconstruct")
                + name("numpy.ndarray")
                + shape
                + text("b")
                + b"\x87R"
            ),
        )
    kind = (
        name("numpy.dtype")
        + text("f4")
        + b"\x89\x88\x87R"
        + b"(K\x03"
        + text("<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    state = (
        b"(K\x01"
        + number(100_000)
        + b"\x85"
        + kind
        + b"\x89"
        + b"B"
        + struct.pack("<I", 400_000)
        + bytes(400_000)
        + b"tq\x00"
    )
    empty = (
        name("numpy.core.multiarray._reconstruct")
        + name("numpy.ndarray")
        + b"K\x00\x85"
        + text("b")
        + b"\x87R"
    )
    yield "one text of many arrays of numpy", in_dictionary(b"(" + state + (empty + b"h\x00b") * 2000 + b"t")
    dtype = name("numpy.dtype") + text("V1099511627776") + b"\x89\x88\x87R"
    yield "a type of numpy", in_dictionary(dtype)
    yield (
        "a number of numpy",
        in_dictionary(name("numpy.core.multiarray.scalar") + dtype + text("") + b"\x86R"),
    )
    yield "a long instruction", whole(b"\x8b", struct.pack("<i", MANY), bytes(MANY), b"N\x86")
    yield "a text longer than the file", whole(b"X", struct.pack("<I", 0xFFFFFFFF), b"a")
    yield "a longer text longer than the file", whole(b"\x8d", struct.pack("<Q", 1 << 60), b"a")
    yield "bytes longer than the file", whole(b"\x8e", struct.pack("<Q", 1 << 60), b"a")
    yield "a decimal number", whole(b"L", b"9" * MANY, b"\n")
    yield "a far place in memory", in_dictionary(b"Nr" + struct.pack("<I", 0xFFFFFFFF))


def claims() -> Iterator[tuple[str, bytes]]:
    """Tensors that are not where they say, over 16 stored bytes."""
    huge = 1 << 61
    yield "a shape", tensor((10**12,), (1,))
    yield "a shape of one value", tensor((10**12,), (0,))
    yield "a shape that overflows", tensor((1 << 31, 1 << 31, 16), (0, 0, 0))
    yield "a negative shape", tensor((-1,), (1,))
    yield "an offset", tensor((4,), (1,), 1)
    yield "a far offset", tensor((1,), (1,), huge)
    yield "an offset of nothing", tensor((0,), (1,), huge)
    yield "a negative offset", tensor((1,), (1,), -1)
    yield "a stride", tensor((2,), (4,))
    yield "a far stride", tensor((2,), (huge,))
    yield "a negative stride", tensor((4,), (-1,))
    yield "no stride", tensor((2, 2), (1,))
    yield "many dimensions", tensor((1,) * 5000, (1,) * 5000)
    yield "overlapping rows", tensor((4, 4), (0, 1))
    yield "a large storage", tensor((4,), (1,), stored=storage(1 << 40))
    yield "a negative storage", tensor((4,), (1,), stored=storage(-4))
    yield "a storage of no type", tensor((4,), (1,), stored=storage(kind="torch.Size"))
    yield "a storage that is not there", tensor((4,), (1,), stored=storage(key="../../etc/passwd"))
    yield "a storage without values", tensor((4,), (1,), stored=storage(location="meta"))
    yield "many tensors", b"(" + storage() + b"q\x00" + tensor((4,), (1,), stored=b"h\x00") * 20_000 + b"t"
    yield "a module", b"(" + text("module") + name("torch.FloatStorage") + text("x") + text("y") + b"tQ"


def zips() -> Iterator[tuple[str, bytes]]:
    data = whole(b"}", text("w"), tensor((4,), (1,)), b"s")
    yield "compressed", archive(data, {"data/0": bytes(50 << 20)}, zipfile.ZIP_DEFLATED)
    yield "packed otherwise", archive(data, {"data/0": bytes(5 << 20)}, zipfile.ZIP_LZMA)
    yield "many entries", archive(data, {f"data/{i}": b"" for i in range(30_000)})
    whole_file = archive(data, {"data/0": bytes(16)})
    start = whole_file.index(b"PK\x01\x02")
    entry = whole_file[start : whole_file.index(b"PK\x01\x02", start + 4)]
    end = bytearray(whole_file[-22:])
    more = entry * 5000
    struct.pack_into("<HHI", end, 8, 5004, 5004, struct.unpack_from("<I", end, 12)[0] + len(more))
    yield "overlapping entries", whole_file[:start] + more + whole_file[start:-22] + bytes(end)
    yield (
        "a large entry",
        whole_file.replace(struct.pack("<II", 16, 16), struct.pack("<II", 1 << 30, 1 << 30)),
    )
    yield (
        "an entry out of the file",
        whole_file[:-22] + whole_file[-22:-6] + struct.pack("<I", 1 << 30) + bytes(2),
    )
    yield "behind something", b"PK\x03\x04" + bytes(1000) + whole_file
    yield "no end", whole_file[:-22]
    yield "two of one name", _renamed(whole_file, b"archive/version", b"archive/data.pk")
    for odd in ("../../../x", "/etc/passwd", "a\x00b", "x" * 60_000, "\u202e", "data/0/../0"):
        yield f"the name {odd[:12]!r}", archive(data, {odd: bytes(16)})


def _renamed(data: bytes, before: bytes, after: bytes) -> bytes:
    return data.replace(before, after).replace(b"archive/data.pkl", b"archive/data.pk\x00")


def safetensors(header: bytes | dict, data: bytes = bytes(16), length: int | None = None) -> bytes:
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(written) if length is None else length) + written + data


def lying_headers() -> Iterator[tuple[str, bytes]]:
    """Of safetensors files."""
    yield "too long", safetensors({"w": GOOD}, length=1 << 62)
    yield "longer than the file", safetensors({"w": GOOD}, length=100_000)
    yield "too short", safetensors({"w": GOOD}, length=5)
    yield "huge", safetensors(b"{" + b" " * (20 << 20) + b"}", b"")
    yield (
        "many names",
        safetensors({f"w{i}": GOOD | {"shape": [0], "data_offsets": [0, 0]} for i in range(15_000)}, b""),
    )
    yield "overlapping", safetensors({"w": GOOD, "v": GOOD})
    yield "beyond the file", safetensors({"w": GOOD | {"shape": [8], "data_offsets": [0, 32]}})
    yield "backwards", safetensors({"w": GOOD | {"data_offsets": [16, 0]}})
    yield "negative", safetensors({"w": GOOD | {"data_offsets": [-16, 0]}})
    yield "a hole", safetensors({"w": GOOD | {"shape": [2], "data_offsets": [8, 16]}})
    yield "another shape", safetensors({"w": GOOD | {"shape": [5]}})
    yield "an overflowing shape", safetensors({"w": GOOD | {"shape": [1 << 32, 1 << 32, 0]}})
    yield (
        "nothing of a huge shape",
        safetensors({"w": GOOD | {"shape": [0, 1 << 62], "data_offsets": [0, 0]}}, b""),
    )
    yield "an unknown type", safetensors({"w": GOOD | {"dtype": "F33"}})
    yield "a number for a type", safetensors({"w": GOOD | {"dtype": 7}})
    yield (
        "a name twice",
        safetensors(b'{"w":' + json.dumps(GOOD).encode() + b',"w":' + json.dumps(GOOD).encode() + b"}"),
    )
    yield "metadata of numbers", safetensors({"__metadata__": {"a": 1}, "w": GOOD})
    yield "metadata of lists", safetensors({"__metadata__": [1], "w": GOOD})
    yield "deep", safetensors(b'{"w":' + b"[" * MANY + b"]" * MANY + b"}")
    yield "no JSON", safetensors(b"{" + b"\xff" * 100 + b"}")
    yield "nothing", safetensors({}, b"")


def families() -> dict[str, dict[str, bytes]]:
    """Every hostile file by family and name."""
    stored = {"data/0": bytes(16)}
    return {
        "honest": honest(),
        "bombs in a zip archive": {what: archive(data, stored) for what, data in bombs()},
        "bombs in torch's old format": {what: MAGIC + data + NO_STORAGES for what, data in bombs()},
        "bombs in a bare pickle": {
            what: data for what, data in bombs() if "numpy" in what or "doubled" in what
        },
        "claims in a zip archive": {what: archive(in_dictionary(data), stored) for what, data in claims()},
        "claims in torch's old format": {what: old(data) for what, data in claims()},
        "zip archives": dict(zips()),
        "safetensors": dict(lying_headers()),
    }


def old(value: bytes) -> bytes:
    data = in_dictionary(value.replace(b"tQ", b"NtQ"))  # a storage has a sixth part there
    return MAGIC + data + pickle.dumps(["0"], protocol=2) + struct.pack("<q", 4) + bytes(16)


def honest() -> dict[str, bytes]:
    """Valid files from the same builders: the others must not be refused for a bug in these."""
    values = tensor((2, 2), (2, 1)), tensor((1, 3), (0, 1), 1), tensor((0,), (1,)), tensor((), ())
    files = {
        f"{i} in a zip archive": archive(in_dictionary(value), {"data/0": bytes(16)})
        for i, value in enumerate(values)
    }
    files |= {f"{i} in torch's old format": old(value) for i, value in enumerate(values)}
    return files | {"safetensors": safetensors({"w": GOOD})}


def peak() -> int:
    """The most bytes that this process held since the last call."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def end_of(path: Path) -> str:
    """Return how reading a file ends: "read", why it is refused, or !! and an unexpected exception."""
    from backbones.reading.source import open_source
    from mae_bench.errors import UserError

    try:
        open_source(path)
    except UserError as error:
        return error.given.replace(str(path), "")
    except BaseException as error:
        return f"!! {type(error).__name__}: {error}"
    return "read"


if __name__ == "__main__":
    import backbones.load  # noqa: F401 - what it takes is not counted

    gc.freeze()  # it need not be gone through after each file
    from tests.backbones.hostile_pickles import bypasses

    folder = Path(sys.argv[1])
    base = 0
    for family, files in (families() | bypasses()).items():
        for what, data in files.items():
            path = folder / (what.partition("named ")[2] or "hostile.pth")
            path.write_bytes(data)
            peak()
            end = end_of(path)
            took = peak()
            base = base or took  # the first file is an honest one: what reading needs in any case
            print(json.dumps([family, what, len(data), end, took - base]), flush=True)
