"""Trusted files: their pickle runs where it can do nothing but make values, of which only data is taken; the record says so."""

import argparse
import json
import os
import pickle
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from backbones.config import CheckpointConfig
from backbones.job import run
from backbones.load import load_backbone
from backbones.reading import trust, unpickle_alone
from backbones.reading.safe import read_file
from backbones.reading.stand_ins import NotBuilt
from mae_bench.config import build
from mae_bench.errors import UserError
from mae_bench.job import Job
from mae_bench.progress import Progress

ATTEMPTS = """
import os, socket, struct, ctypes, threading, tempfile
system = ctypes.CDLL(None)
def started(*clone):
    process = system.syscall(*clone, 0, 0, 0, 0)
    return process or os._exit(0)
def fill(files, folder=tempfile.gettempdir()):
    return sum(open(f"{folder}/{i}", "wb").write(bytes(1 << 24)) for i in range(files)) >> 24
facts = {"environment": dict(os.environ), "process": os.getpid(), "files": sorted(map(int, os.listdir("/proc/self/fd")))}
def attempt(name, call):
    try:
        facts[name] = repr(call())
    except BaseException as error:
        facts[name] = type(error).__name__
attempt("socket", lambda: socket.create_connection(("127.0.0.1", PORT), 1))
attempt("unix socket", lambda: socket.socket(socket.AF_UNIX))
attempt("name", lambda: socket.getaddrinfo("example.org", 80))
attempt("write", lambda: open("SENTINEL", "w"))
attempt("shell", lambda: os.system("touch SENTINEL"))
attempt("undo", lambda: system.mount(b"none", b"/", None, 4096 | 32, None))
attempt("unshare", lambda: system.unshare(0x10000000))
attempt("namespace", lambda: started(CLONE, 0x10000000 | 17))
attempt("newer namespace", lambda: started(435, struct.pack("11Q", 0x10000000, 0, 0, 0, 17, *6 * [0]), 88))
attempt("process of ours", lambda: started(CLONE, 17) > 1)
attempt("thread", lambda: threading.Thread(target=int).start())
attempt("a little in memory", lambda: fill(1))
attempt("much in memory", lambda: fill(9))
attempt("memory", lambda: bytearray(1 << 40))
"""


class Call:
    """Pickled, it asks its reader to call `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class ViTOfAnotherPackage(VisionTransformer):
    """A model that is pickled by the name of a class that the subprocess does not find."""


class OfAnotherPackage:
    """Pickled by name; the subprocess does not find it."""

    def __init__(self):
        self.value = torch.ones(3)


def run_code(code: str) -> Call:
    return Call(eval, f"(lambda space: (exec({code!r}, space), space.get('facts'))[1])({{}})")


@pytest.fixture(scope="session")
def possible(tmp_path_factory) -> None:
    """Skips where the system has no namespaces for users: there, nothing is run."""
    folder = str(tmp_path_factory.mktemp("possible"))
    code = f"import runpy; runpy.run_path({str(trust.PROGRAM)!r})['cut_off'](0, 60, {folder!r})"
    if subprocess.run([sys.executable, "-I", "-c", code], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no user namespaces here")


@pytest.fixture
def evil(tmp_path, encoder):
    """Weights beside a call, which is harmless but unknown to the reader."""
    path = tmp_path / "evil.pth"
    torch.save(
        {
            "model": encoder,
            "args": argparse.Namespace(epochs=3, call=Call(os.getpid)),
            "other": OfAnotherPackage(),
        },
        path,
    )
    return path


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts another program in the place of the one that unpickles."""

    def place(code: str) -> None:
        (tmp_path / "program.py").write_text(code)
        monkeypatch.setattr(trust, "PROGRAM", tmp_path / "program.py")

    return place


def test_it_is_refused_without_trust(evil):
    for read in (read_file, load_backbone):
        with pytest.raises(
            UserError, match=r"wants to build 'posix.getpid', '[\w.]+OfAnotherPackage'[^$]*--trust"
        ):
            read(evil)


def test_a_trusted_file_gives_its_weights_and_the_record_says_so(tmp_path, evil, encoder, possible):
    value = {"kind": "checkpoint", "source": str(evil), "trust": True}
    outcome = run(
        build(CheckpointConfig, value, "test"),
        Job("x", "checkpoint", value, tmp_path / "cell", 0),
        Progress(),
    )
    assert trust.TRUSTED in outcome.conversion_report["notes"]
    assert trust.TRUSTED in outcome.notes
    weights = load_backbone(f"run:{tmp_path / 'cell'}")[0].state_dict()
    assert torch.equal(weights["blocks.0.attn.qkv.weight"], encoder["blocks.0.attn.qkv.weight"])


def test_the_record_of_a_file_that_needs_no_trust_says_nothing(files):
    report = load_backbone(files["checkpoint-7"][0], trust=True)[2]
    assert trust.TRUSTED not in report.notes


def test_the_pickle_can_do_nothing_but_make_values(tmp_path, monkeypatch, possible):
    monkeypatch.setenv("SECRET_TOKEN", "do not tell")
    sentinel = tmp_path / "sentinel"
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = ATTEMPTS.replace("PORT", str(server.getsockname()[1])).replace("SENTINEL", str(sentinel))
        code = code.replace("CLONE", str(unpickle_alone.FORBIDDEN[platform.machine()][1]))
        content = {
            "facts": run_code(code),
            "w": torch.arange(6.0).view(2, 3).t(),
            "x": OfAnotherPackage(),
            "n": (1, [2.5, None]),
        }
        torch.save(content, tmp_path / "x.pth")
        read = read_file(tmp_path / "x.pth", trust=True)
    facts = read.content["facts"]
    assert read.trusted
    assert torch.equal(read.content["w"], torch.arange(6.0).view(2, 3).t())
    assert isinstance(read.content["x"], NotBuilt)
    assert read.content["n"] == (1, [2.5, None])
    assert "SECRET_TOKEN" not in facts["environment"]
    assert facts["process"] == 1  # nothing that it starts outlives it
    assert len(facts["files"]) == 6  # standard ones, the weights, the output, and the folder that is listed
    assert {name: facts[name] for name in ("socket", "unix socket", "memory")} == {
        "socket": "PermissionError", "unix socket": "PermissionError", "memory": "MemoryError",
    }  # fmt: skip
    assert facts["name"] in ("gaierror", "PermissionError")
    assert facts["undo"] == facts["unshare"] == facts["namespace"] == facts["newer namespace"] == "-1"
    assert (facts["process of ours"], facts["thread"]) == (
        "True",
        "None",
    )  # else the line above would prove little
    assert (facts["a little in memory"], facts["much in memory"]) == ("1", "OSError")
    assert not sentinel.exists()
    assert not Path(facts["environment"]["TMPDIR"]).exists()


def test_the_attempts_would_succeed_elsewhere(tmp_path):
    """Else the test above would prove nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        space: dict = {}
        tried = [f'attempt("{name}"' for name in ("socket", "unix socket", "write", "shell")]
        lines = [
            line
            for line in ATTEMPTS.splitlines()
            if line.startswith(tuple(tried)) or not line.startswith("attempt(")
        ]
        code = (
            "\n".join(lines)
            .replace("PORT", str(server.getsockname()[1]))
            .replace("SENTINEL", str(tmp_path / "sentinel"))
        )
        exec(code, space)
    assert "socket" in space["facts"]["socket"]
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("code", ["import os; os._exit(0)", "raise ValueError('[red]x[/red]')"])
def test_a_pickle_that_fails_is_a_users_mistake(tmp_path, code, possible):
    (tmp_path / "x.pth").write_bytes(pickle.dumps(run_code(code), protocol=2))
    with pytest.raises(UserError, match="cannot be unpickled") as error:
        read_file(tmp_path / "x.pth", trust=True)
    assert "state_dict in the environment that the file comes from" in error.value.fix


def test_a_whole_model_is_its_weights(tmp_path, possible):
    """Also one whose class is not installed: its tensors stand in the file all the same."""
    sizes: Any = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 192,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 10,
    }
    models = {"timm's": VisionTransformer(**sizes).eval(), "another": ViTOfAnotherPackage(**sizes).eval()}
    torch.save(models, tmp_path / "x.pth")
    content = read_file(tmp_path / "x.pth", trust=True).content
    imgs = torch.randn(2, 3, 32, 32)
    for name, model in models.items():
        torch.save(content[name], tmp_path / "state_dict.pth")
        vit = load_backbone(tmp_path / "state_dict.pth")[0].eval()
        assert torch.equal(vit.forward_features(imgs), model.forward_features(imgs))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_program_of_torchscript_is_named_and_gives_its_weights(tmp_path, possible):
    model = torch.nn.Linear(3, 2)
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3)), tmp_path / "x.pt")
    with pytest.raises(UserError, match="TorchScript archive[^$]*--trust"):
        read_file(tmp_path / "x.pt")
    content = read_file(tmp_path / "x.pt", trust=True).content
    assert torch.equal(content["weight"], model.weight)


def test_nothing_is_run_where_the_network_cannot_be_taken_away(evil, stub, monkeypatch, capsys):
    monkeypatch.setattr(unpickle_alone.platform, "machine", lambda: "m68k")
    monkeypatch.setattr(unpickle_alone, "work", lambda *_: pytest.fail("it was run"))
    monkeypatch.setattr(sys, "argv", ["unpickle_alone.py", "0", "1", "100", "5", "/tmp"])
    assert unpickle_alone.main() == trust.NOT_ALONE == unpickle_alone.NOT_ALONE
    assert "m68k" in capsys.readouterr().err
    stub("import sys; print('unshare: Operation not permitted', file=sys.stderr); sys.exit(97)")
    with pytest.raises(UserError, match="not possible here: unshare: Operation not permitted"):
        read_file(evil, trust=True)


@pytest.mark.parametrize(
    "code",
    [
        "",
        "import os, sys; os.write(int(sys.argv[2]), b'junk' * 9)",
        "import os, sys; os.write(int(sys.argv[2]), b'\\x80\\x02cposix\\nsystem\\n(X\\x02\\x00\\x00\\x00lstR.')",
        "import sys; sys.exit(3)",
        "import sys; sys.stderr.write('x' * 100_000); sys.exit(1)",
        "import os; os.kill(os.getpid(), 11)",
    ],
)
def test_what_the_subprocess_writes_is_read_as_data(evil, stub, code):
    stub(code)
    with pytest.raises(UserError) as error:
        read_file(evil, trust=True)
    assert len(str(error.value)) < 1000


def test_a_subprocess_that_does_not_end_is_ended(evil, stub, monkeypatch):
    monkeypatch.setattr(trust, "SECONDS", 1)
    monkeypatch.setattr(trust, "GRACE", 0)
    stub("import time; time.sleep(600)")
    with pytest.raises(UserError, match="the subprocess ended"):
        read_file(evil, trust=True)


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "7", "[]", "[1, 2, 3]", '["tensor", "9"]', '["tensor", []]', '["dict", [[["a"], ["value", 1]]]]',
     '["dict", 3]',
     '["namespace", [[1, ["value", 1]]]]', "[" * 100_000, '["list", [' * 5000 + "]]" * 5000],
)  # fmt: skip
def test_a_description_that_is_none(tmp_path, content):
    with pytest.raises(UserError, match="cannot be read"):
        trust.rebuild({"0": torch.zeros(1)}, content, tmp_path)


def test_a_description_is_rebuilt():
    inside = ["tuple", [["value", None], ["other", "os.system"]]]
    told = ["dict", [["a", ["tensor", "0"]], [1, inside], ["n", ["namespace", [["x", ["value", 2]]]]]]]
    value = trust.rebuild({"0": torch.ones(1)}, json.dumps(told), Path("x"))
    assert list(value) == ["a", 1, "n"]
    assert value["n"] == argparse.Namespace(x=2)
    assert isinstance(value[1][1], NotBuilt)
