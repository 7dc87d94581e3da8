"""The program that runs a trusted file's pickle, cut off from network and file system, and writes what it made as safetensors.

Started by `backbones.reading.trust`: FILE_FD OUT_FD SIZE SECONDS FOLDER. The one place where a pickle is run; imports nothing of ours.
"""

import ctypes
import json
import os
import pickle
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Mapping
from typing import IO, Any

NOT_ALONE = 97
NAMESPACES = (
    0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000
)  # CLONE_NEW: USER, NET, PID, IPC, NS (mounts)
READ_ONLY, RECURSIVE, HERE, MOUNT_SETATTR = 1, 0x8000, -100, 442  # mount_setattr(2)
NO_NEW_PRIVILEGES, SECCOMP, FILTER, PARENT_DEATH = 38, 22, 2, 1  # prctl(2)
# Of each machine: its name for seccomp, the numbers of clone, and of socket, ptrace, unshare, process_vm_writev, io_uring_setup.
FORBIDDEN = {
    "x86_64": (0xC000003E, 56, (41, 101, 272, 311, 425)),
    "aarch64": (0xC00000B7, 220, (198, 117, 97, 271, 425)),
}
CLONE3, NEW_USER = 435, 0x10000000
NOBODY = 65534
SCRATCH, NO_SETUID_DEVICES_PROGRAMS = b"size=64m,nr_inodes=4096,mode=700", 2 | 4 | 8  # of tmpfs, mount(2)
TORCH_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # of its files from before its zip archives
MAX_DEPTH = 50


def cut_off(size: int, seconds: int, folder: str) -> None:
    """Takes network, sockets, privileges, writing and unbounded use away; OSError where that cannot be done.

    What packages want to write when they are imported goes to `folder`: an empty one outside, here 64 MiB of memory.
    """
    if sys.platform != "linux" or platform.machine() not in FORBIDDEN:
        raise OSError(f"{sys.platform} on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    ids = {
        "uid_map": f"{NOBODY} {os.geteuid()} 1",
        "setgroups": "deny",
        "gid_map": f"{NOBODY} {os.getegid()} 1",
    }
    _check(libc.unshare(NAMESPACES), "unshare")
    for file, text in ids.items():  # without a name in the namespace it could not own a file in the folder
        with open(f"/proc/self/{file}", "w") as opened:
            opened.write(text)
    attributes = struct.pack("QQQQ", READ_ONLY, 0, 0, 0)
    libc.syscall(
        MOUNT_SETATTR, HERE, b"/", RECURSIVE, attributes, len(attributes)
    )  # before Linux 5.12 it stays writable
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", NO_SETUID_DEVICES_PROGRAMS, SCRATCH), "mount")
    for limit, most in {
        resource.RLIMIT_DATA: 4 * size + (4 << 30), resource.RLIMIT_FSIZE: 4 * size + (64 << 20), resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_NPROC: 64, resource.RLIMIT_NOFILE: 256, resource.RLIMIT_CORE: 0,
    }.items():  # fmt: skip
        resource.setrlimit(limit, (most, most))
    _check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
    _forbid(libc, *FORBIDDEN[platform.machine()])
    _check(
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset"
    )  # else it could undo what is above


def _check(result: int, call: str) -> None:
    if result:
        raise OSError(f"{call}: {os.strerror(ctypes.get_errno())}")


def _forbid(libc: ctypes.CDLL, machine: int, clone: int, calls: tuple[int, ...]) -> None:
    """A seccomp filter: calls of another machine's numbering end the process, the given ones fail, clone makes no namespace.

    clone3 is answered as by an old kernel (then clone is called): its flags lie where a filter cannot look.
    """
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    rules = [(load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, 0x80000000), (load, 0, 0, 0)]
    rules.append((at_least, len(calls) + 5, 0, 0x40000000))  # x86's third numbering
    rules += [(equal, len(calls) + 4 - i, 0, call) for i, call in enumerate(calls)]
    rules += [(equal, 5, 0, CLONE3), (equal, 0, 2, clone), (load, 0, 0, 16), (any_bit, 1, 0, NEW_USER)]
    rules += [
        (answer, 0, 0, 0x7FFF0000),
        (answer, 0, 0, 0x00050001),
        (answer, 0, 0, 0x00050026),
    ]  # allow; EPERM; ENOSYS
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code))
    _check(libc.prctl(SECCOMP, FILTER, program, 0, 0), "seccomp")


class Missing:
    """Stands for an object of a class that is not installed here: for a model (torch's Module), with its weights."""

    def __init__(self, *args: Any, **keywords: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and {"_modules", "_parameters", "_buffers"} <= set(state):
            super().__setstate__(state)  # type: ignore[misc]

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class Unpickler(pickle.Unpickler):
    """pickle's, which goes on where a class is not installed: it may be that of the whole model, or nothing of importance."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            import torch

            return type(name, (Missing, torch.nn.Module), {"__module__": module})


def lenient() -> types.ModuleType:
    """A module as torch wants its `pickle_module`."""
    module = types.ModuleType("lenient")
    module.__dict__.update(
        Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load()
    )
    return module


def read(file: IO[bytes]) -> Any:
    """The content of a file of torch.save, of a TorchScript archive, or of a bare pickle."""
    import zipfile

    start = file.read(64)
    file.seek(0)
    if not start.startswith(b"PK") and TORCH_MAGIC not in start:
        return Unpickler(file, encoding="latin1").load()
    import torch

    if zipfile.is_zipfile(file):
        names = zipfile.ZipFile(file).namelist()
        file.seek(0)
        if any(name.endswith("/constants.pkl") for name in names):
            return torch.jit.load(file, map_location="cpu").state_dict()
    file.seek(0)
    return torch.load(file, map_location="cpu", pickle_module=lenient())


def describe(value: Any, tensors: dict[str, Any], depth: int = 0) -> list[Any]:
    """A pair (what it is, what is in it) of JSON; tensors are named by numbers and collected."""
    import numpy as np
    import torch

    if depth > MAX_DEPTH:
        return ["other", "nested too deep"]
    if isinstance(value, torch.nn.Module) and "_modules" in vars(value):
        value = value.state_dict()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(value)
    if (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
    ):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return ["tensor", name]
    if isinstance(value, Mapping):
        keys = [
            (key if isinstance(key, str | int) else str(type(key)), inside) for key, inside in value.items()
        ]
        return ["dict", [[key, describe(inside, tensors, depth + 1)] for key, inside in keys]]
    if isinstance(value, list | tuple):
        return [
            "list" if isinstance(value, list) else "tuple",
            [describe(inside, tensors, depth + 1) for inside in value],
        ]
    if type(value).__name__ == "Namespace":
        return [
            "namespace",
            describe({str(key): inside for key, inside in vars(value).items()}, tensors, depth + 1)[1],
        ]
    if isinstance(value, np.generic):
        value = value.item()
    plain = value is None or type(value) in (bool, int, float, str)
    return ["value", value] if plain else ["other", f"{type(value).__module__}.{type(value).__qualname__}"]


def work(file: int, out: int) -> None:
    """Unpickles and writes."""
    tensors: dict[str, Any] = {}
    with os.fdopen(file, "rb") as opened:
        content = describe(read(opened), tensors)
    from safetensors.torch import save

    with os.fdopen(out, "wb") as written:
        written.write(save(tensors, {"content": json.dumps(content)}))


def main() -> int:
    """Cuts itself off, then works as the first process of its namespace: when that ends, all that it started ends."""
    file, out, size, seconds = map(int, sys.argv[1:5])
    try:
        cut_off(size, seconds, sys.argv[5])
    except OSError as error:
        print(error, file=sys.stderr)
        return NOT_ALONE
    if (child := os.fork()) == 0:
        try:
            ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
            work(file, out)
            code = 0
        except BaseException as error:  # whatever the pickle raises is told in one line
            print(f"{type(error).__name__}: {str(error)[:200]!r}", file=sys.stderr)
            code = 1
        sys.stderr.flush()
        os._exit(code)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(seconds)
    return 1 if os.waitpid(child, 0)[1] else 0


if __name__ == "__main__":
    sys.exit(main())
