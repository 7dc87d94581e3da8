"""Hostile and damaged files: none runs code or crashes, each ends in a UserError that says what it is."""

import argparse
import importlib
import io
import json
import operator
import os
import pickle
import re
import resource
import struct
import tarfile
import zipfile
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from backbones.config import CheckpointConfig
from backbones.convert import convert
from backbones.inspection import inspect_checkpoint
from backbones.job import run
from backbones.load import load_backbone, translate
from backbones.reading import safe
from backbones.reading.safe import read_file
from backbones.reading.source import open_source
from backbones.reading.stand_ins import ALLOWED, NotBuilt, Stored
from mae_bench.config import build
from mae_bench.errors import UserError
from mae_bench.files import file_digest
from mae_bench.job import Job
from mae_bench.progress import Progress

pytestmark = pytest.mark.usefixtures("toy_heads")
NAMED = ("add", "sub", "mul", "and_", "or_", "xor", "neg", "pos", "abs")  # functions of operator


class Call:
    """Pickled, it asks its reader to call `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def nested(payload):
    return {"model": {"w": torch.zeros(2)}, "optimizer": {"state": [({"deep": (1, [payload])},)]}}


def in_namespace(payload):
    return {"model": {"w": torch.zeros(2)}, "args": argparse.Namespace(resume=payload)}


WRAPPINGS = {
    "bare": lambda p: p,
    "as a tensor": lambda p: {"model": {"w": p}},
    "nested": nested,
    "in args": in_namespace,
}


SAVES = {
    "zip": torch.save,
    "torch's old": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    "new pickle": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=5)),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_calls_do_not_run(tmp_path, wrap, save):
    sentinel = tmp_path / "sentinel"
    payloads = {
        "posix.system": Call(os.system, f"touch {sentinel}"),
        "builtins.eval": Call(eval, f"open({str(sentinel)!r}, 'w').close()"),
        "builtins.exec": Call(exec, f"open({str(sentinel)!r}, 'w').close()"),
        "io.open": Call(open, str(sentinel), "w"),
        "importlib.import_module": Call(importlib.import_module, "os"),
        "torch.serialization.load": Call(torch.load, str(sentinel)),
    }
    for name, payload in payloads.items():
        SAVES[save](wrap(payload), tmp_path / "evil.pth")
        with pytest.raises(UserError) as error:
            load_backbone(tmp_path / "evil.pth")
        assert not sentinel.exists()
        assert "wants to build" in str(error.value)
        assert repr(name) in str(error.value)
        assert "weights_only" not in str(error.value)  # torch's own message advises to switch the safety off


def test_every_class_in_the_way_is_named_with_a_way_out(tmp_path):
    """Nothing in the program executes it, whatever the user says: the fix is a container."""
    payloads = [Call(os.system, "true"), Call(os.getpid), *(Call(getattr(operator, n)) for n in NAMED)]
    torch.save({"model": {"w": torch.zeros(2)}, "other": payloads}, tmp_path / "x.pth")
    for use in (read_file, load_backbone, inspect_checkpoint):
        with pytest.raises(UserError) as error:
            use(tmp_path / "x.pth")
        assert all(f".{name}'" in error.value.given for name in ("system", "getpid", *NAMED))
        assert "container without network: docs/checkpoints.md" in error.value.fix


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_program_of_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3)), tmp_path / "x.pt")
    with pytest.raises(UserError, match="TorchScript archive[^$]*container without network"):
        read_file(tmp_path / "x.pt")


def test_the_payload_of_this_corpus_would_run(tmp_path):
    """Else the test above would prove nothing."""
    pickle.loads(pickle.dumps(Call(os.system, f"touch {tmp_path / 'sentinel'}")))
    assert (tmp_path / "sentinel").exists()


def test_a_namespace_is_read_and_leaves_no_permission_behind(files):
    content = read_file(files["checkpoint-7"][0]).content
    assert content["args"].model == "mae_vit_toy"
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("name", ["encoder", "timm.safetensors", "timm.bin"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.99])
def test_truncated_files(tmp_path, files, name, share):
    data = files[name][0].read_bytes()
    (tmp_path / "cut").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="cut is"):
        load_backbone(tmp_path / "cut")


def small(path):
    """A file of every form that is all header: nearly every bit of it means something."""
    content = {
        "model": {"w": torch.ones(2, 3), "v": torch.ones(4)[1:]},
        "args": argparse.Namespace(lr=0.1),
        "epoch": np.float64(3),
    }
    if path.suffix == ".safetensors":
        save_file({"w": torch.ones(2, 3), "v": torch.ones(3)}, path, {"spec": "{}"})
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": {"w": np.ones((2, 3), np.float32)}, "by": "x"}, protocol=4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=path.suffix == ".zip")
    return path.read_bytes()


@pytest.mark.parametrize("form", ["zip", "old", "pkl", "safetensors"])
def test_no_damage_ends_in_anything_but_a_file_or_a_sentence(tmp_path, form):
    """Flipped bits, other bytes, cut and doubled stretches, anywhere."""
    data, random, ends = small(tmp_path / f"x.{form}"), Random(0), Counter[str]()
    for i in range(300):
        changed, at = bytearray(data), random.randrange(len(data))
        match i % 4:
            case 0:
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                changed[at : at + random.randrange(1, 9)] = random.randbytes(random.randrange(9))
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = changed[at : at + random.randrange(1, 99)]
        (tmp_path / "x").write_bytes(changed)
        try:
            open_source(tmp_path / "x")
            ends["read"] += 1
        except UserError:
            ends["refused"] += 1
    assert ends["refused"] > 100  # most damage shows
    assert open_source(tmp_path / f"x.{form}").tensors["w"].tolist() == [[1] * 3] * 2


def tarred(mode: Literal["w", "w:gz", "w:xz"]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO())
    return out.getvalue()


def zipped(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "told", "fix"),
    [
        (b"", "empty", "download"),
        (b"import torch\n" * 99, "text or code", "the file with the weights"),
        (
            b"int f() {\n return 1; }",
            "text or code",
            "the file with the weights",
        ),  # a brace where safetensors have theirs
        ("é".encode() * 999, "text or code", "the file with the weights"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page", "raw file"),
        (b"\xef\xbb\xbf\r\n  <html lang='en'>", "a web page", "raw file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer", "git lfs pull"),
        (tarred("w"), "a packed archive", "unpack"),
        (tarred("w:gz"), "a packed archive", "unpack"),
        (tarred("w:xz"), "a packed archive", "unpack"),
        (zipped(), "a packed archive", "unpack"),
        (
            zipped("code/\x1b[31m.py", "b.pth"),
            r"zip archive of 'code/\\x1b\[31m.py', 'b.pth', not of torch",
            "unpack",
        ),
        (zipped("Transformer/kernel.npy"), "numpy arrays", "convert"),
        (
            zipped("archive/data.pkl"),
            r"damaged checkpoint: RuntimeError: Expected hasRecord\(\"version\"\)[^(]*$",
            "download",
        ),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "neither safetensors", "download"),
        (struct.pack("<Q", 1 << 60) + b"{" + bytes(64), "damaged safetensors", "download"),
        (pickle.dumps([1, 2, 3], protocol=2), "holds list", "state_dict"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, data, told, fix):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(UserError) as error:
        load_backbone(tmp_path / "x.pth")
    assert re.search(told, error.value.given)
    assert fix in error.value.fix


@pytest.mark.parametrize(
    "value", [[1, 2], {"model": {"epoch": 3}}, {"model": torch.nn.Linear(1, 1).state_dict, "x": 1}, {}]
)
def test_files_of_torch_without_weights(tmp_path, value):
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(UserError):
        load_backbone(tmp_path / "x.pth")


def safetensors_file(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("shape", [[1 << 40], [1 << 62, 4], [-1], [2]])
def test_safetensors_with_made_up_shapes(tmp_path, shape):
    data = safetensors_file({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}, bytes(4))
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError):
        open_source(tmp_path / "x.safetensors")


class Shaped:
    """Pickled as a tensor of any size over four stored numbers."""

    def __init__(self, size, stride):
        self.size, self.stride = size, stride
        self.storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
        )

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.size, self.stride, False, {})


@pytest.mark.parametrize(
    ("size", "stride"), [((10**12,), (1,)), ((10**12,), (0,)), ((2**62,), (1,)), ((2**31, 2**31), (0, 0))]
)
def test_pickled_tensors_with_made_up_shapes_allocate_nothing(tmp_path, size, stride):
    torch.save({"model": {"w": Shaped(size, stride)}}, tmp_path / "x.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        open_source(tmp_path / "x.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB


def test_a_zip_bomb_is_refused_packed(tmp_path, files):
    with (
        zipfile.ZipFile(files["encoder"][0]) as source,
        zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    with pytest.raises(UserError, match="compressed"):
        open_source(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "[red]markup[/red]", "\n", ""])
def test_odd_names_of_tensors_are_only_names(tmp_path, encoder, name):
    torch.save({**encoder, name: torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="unexpected"):
        load_backbone(tmp_path / "x.pth")


UNUSUAL = {
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "float8"),
    "float8_e5m2": (lambda t: t.to(torch.float8_e5m2), "float8"),
    "int8": (lambda t: t.to(torch.int8), r"torch\.int8"),
    "uint8": (lambda t: t.to(torch.uint8), r"torch\.uint8"),
    "bool": (lambda t: t > 0, r"torch\.bool"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantised"),
    "sparse": (lambda t: t.to_sparse(), "sparse"),
    "meta": (lambda t: t.to("meta"), "meta"),
    "NaN": (lambda t: t * float("nan"), "NaN"),
    "infinity": (lambda t: t / 0, "infinity"),
}


@pytest.mark.filterwarnings("ignore")  # torch says that quantised tensors will go
@pytest.mark.parametrize("suffix", ["pth", "old", "safetensors"])
@pytest.mark.parametrize(("change", "told"), UNUSUAL.values(), ids=UNUSUAL)
def test_weights_that_are_no_plain_numbers_are_refused_by_name(tmp_path, encoder, change, told, suffix):
    weights = {**encoder, "norm.bias": change(encoder["norm.bias"] + 1)}
    if suffix == "safetensors":
        if told in ("quantised", "sparse", "meta"):
            pytest.skip("safetensors has no such tensors")
        save_file(weights, tmp_path / "x.safetensors")
    else:
        torch.save(weights, tmp_path / f"x.{suffix}", _use_new_zipfile_serialization=suffix == "pth")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_read(tmp_path, encoder, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in encoder.items()}
    save_file(stored, tmp_path / "x.safetensors")
    for zipped in (True, False):
        torch.save(stored, tmp_path / f"x{zipped}.pth", _use_new_zipfile_serialization=zipped)
    for path in sorted(tmp_path.iterdir()):
        weights = load_backbone(path)[0].state_dict()
        assert torch.equal(weights["blocks.1.mlp.fc2.weight"], stored["blocks.1.mlp.fc2.weight"].float())


class TestWhatTrainingFilesHold:
    """Each thing that the allow-list is for, as its own library pickles it, beside a tensor."""

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (np.float64(3.5), 3.5),
            (np.int64(-4), -4),
            (np.bool_(True), True),
            (defaultdict(list, {"a": [1]}), {"a": [1]}),
            (Counter({30: 1}), {30: 1}),
            (torch.Size([2]), (2,)),
            (torch.device("cuda", 0), torch.device("cuda", 0)),
            (torch.bfloat16, torch.bfloat16),
            ({1, 2}, {1, 2}),
            (b"\xff", b"\xff"),
            (2**70, 2**70),
            (argparse.Namespace(a=[1]), argparse.Namespace(a=[1])),
            (torch.nn.Linear(1, 1, bias=False).state_dict().__class__(a=1), {"a": 1}),
        ],
    )
    def test_values_are_read(self, tmp_path, value, expected, zipped):
        torch.save(
            {"w": torch.ones(2), "x": value}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped
        )
        assert read_file(tmp_path / "x.pth").content["x"] == expected

    @pytest.mark.parametrize(
        "value", [Path("/x"), np.arange(3), np.str_("x"), np.random.default_rng(0).normal(size=(2, 2))]
    )
    def test_objects_are_not_built(self, tmp_path, value):
        torch.save({"w": torch.ones(2), "x": value}, tmp_path / "x.pth")
        assert isinstance(read_file(tmp_path / "x.pth").content["x"], NotBuilt | Stored)

    def test_configurations_and_histories(self, tmp_path):
        omegaconf, yacs = pytest.importorskip("omegaconf"), pytest.importorskip("yacs.config")
        config, logging = pytest.importorskip("mmengine.config"), pytest.importorskip("mmengine.logging")
        history = logging.HistoryBuffer()
        history.update(0.5)
        tree = {"a": 1, "b": {"c": [1, 2.5, "x", None]}}
        content = {
            "cfg": omegaconf.OmegaConf.create(tree),
            "config": yacs.CfgNode({"a": 1, "b": {"c": 2}}),
            "loss": history,
        }
        torch.save({"w": torch.ones(2), **content, "mm": config.ConfigDict(tree)}, tmp_path / "x.pth")
        read = read_file(tmp_path / "x.pth").content
        assert (read["config"], read["mm"]) == ({"a": 1, "b": {"c": 2}}, tree)
        assert isinstance(read["cfg"], NotBuilt)
        assert isinstance(read["loss"], NotBuilt)

    @pytest.mark.parametrize("protocol", [2, 3, 4])
    def test_detectron2s_pickles_of_arrays(self, tmp_path, protocol):
        weights: dict[str, Any] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3)}
        (tmp_path / "x.pkl").write_bytes(
            pickle.dumps({"model": weights, "__author__": "x"}, protocol=protocol)
        )
        content = read_file(tmp_path / "x.pkl").content
        assert content["__author__"] == "x"
        assert {name: tensor.tolist() for name, tensor in content["model"].items()} == {
            n: a.tolist() for n, a in weights.items()
        }

    @pytest.mark.parametrize(
        "array",
        [np.array([None]), np.asfortranarray(np.ones((2, 3))), np.ones(2, ">f4"), np.ones(2, "f4,f4")],
    )
    def test_other_arrays_are_refused(self, tmp_path, array):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"a": array}}, protocol=4))
        with pytest.raises(UserError, match="numpy"):
            read_file(tmp_path / "x.pkl")

    def test_every_name_has_its_reason(self):
        assert all(len(reason) > 7 for _, reason in ALLOWED.values())


def test_a_pinned_digest_must_match(files):
    path = files["encoder"][0]
    digest = file_digest(path)
    assert load_backbone(path, sha256=digest.upper())[2].digest == digest
    with pytest.raises(UserError, match=digest):
        load_backbone(path, sha256="0" * 64)


def test_a_wrong_digest_stops_before_anything_is_parsed(files, monkeypatch):
    monkeypatch.setattr(safe, "_read", lambda *_: pytest.fail("it was parsed"))
    for name in ("encoder", "timm.safetensors"):
        with pytest.raises(UserError, match="has SHA-256"):
            load_backbone(files[name][0], sha256="0" * 64)


@pytest.mark.parametrize("how", ["written to", "replaced", "linked elsewhere"])
def test_what_is_parsed_is_what_was_hashed(tmp_path, files, monkeypatch, how):
    """A file that changes in between is refused; another that takes its place is not looked at."""
    first, other, path = tmp_path / "first.pth", tmp_path / "other.pth", tmp_path / "x.pth"
    first.write_bytes(files["encoder"][0].read_bytes())
    torch.save({"model": {"w": torch.zeros(1)}}, other)
    path.symlink_to(first)
    read = safe._read

    def meanwhile(*args):
        if how == "written to":
            first.write_bytes(other.read_bytes())
        elif how == "replaced":
            os.replace(other, first)
        else:
            path.unlink()
            path.symlink_to(other)
        return read(*args)

    monkeypatch.setattr(safe, "_read", meanwhile)
    if how == "linked elsewhere":
        found = read_file(path)
        assert found.digest == file_digest(first)
        assert "cls_token" in found.content["model"]
    else:
        with pytest.raises(UserError, match="changed while it was read"):
            read_file(path)


@pytest.mark.parametrize("use", [load_backbone, lambda path: convert(path, path.parent / "out", "mae_bench")])
@pytest.mark.parametrize("name", ["encoder", "timm.safetensors"])
@pytest.mark.parametrize("how", ["written to", "removed", "left alone"])
def test_what_is_used_is_what_was_hashed(tmp_path, files, monkeypatch, name, use, how):
    """The tensors are mapped: until they are copied, they change with the file."""
    path = tmp_path / files[name][0].name
    path.write_bytes(files[name][0].read_bytes())
    os.utime(path, ns=(0, 0))

    def meanwhile(checkpoint, *args):
        if how == "written to":
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(bytes(400))
        elif how == "removed":
            path.unlink()
        return translate(checkpoint, *args)

    for user in ("load", "convert"):
        monkeypatch.setattr(f"backbones.{user}.translate", meanwhile if how != "left alone" else translate)
    with (
        pytest.raises(UserError, match="changed while it was read") if how != "left alone" else nullcontext()
    ):
        use(path)
    assert (tmp_path / "out").exists() == (use is not load_backbone and how == "left alone")


def test_the_record_holds_the_digest_of_every_file(tmp_path, encoder):
    names = sorted(encoder)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for shard, inside in shards.items():
        save_file({name: encoder[name] for name in inside}, tmp_path / shard)
    index = {
        "metadata": {},
        "weight_map": {name: shard for shard, inside in shards.items() for name in inside},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    value = {"kind": "checkpoint", "source": str(tmp_path)}
    job = Job("x", "checkpoint", value, tmp_path / "cell", 0)
    outcome = run(build(CheckpointConfig, value, "test"), job, Progress())
    held = outcome.conversion_report["files"]
    assert {shard: file_digest(tmp_path / shard) for shard in shards}.items() <= held.items()
