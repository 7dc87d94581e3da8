"""A corpus of hostile and damaged files: none runs code, none crashes, each ends in a UserError that says what it is."""

import argparse
import importlib
import json
import os
import pickle
import resource
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from backbones.load import load_backbone
from backbones.safe import read_file
from backbones.source import open_source
from mae_bench.digest import file_digest
from mae_bench.errors import UserError


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


WRAPPINGS = {"bare": lambda p: p, "as a tensor": lambda p: {"model": {"w": p}}, "nested": nested, "in args": in_namespace}


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


@pytest.mark.parametrize("position", range(12))
@pytest.mark.parametrize("name", ["encoder", "timm.safetensors"])
def test_a_flipped_bit_in_the_header_never_crashes(tmp_path, files, name, position):
    data = bytearray(files[name][0].read_bytes())
    data[position] ^= 1 << (position % 8)
    (tmp_path / "flipped").write_bytes(data)
    try:
        _, spec, _ = load_backbone(tmp_path / "flipped")
        assert spec.embed_dim == 192  # a field that no reader looks at
    except UserError:
        pass


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "empty"),
        (b"these are not weights\n" * 9, "neither safetensors"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "neither safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{" + bytes(64), "damaged safetensors"),
        (pickle.dumps([1, 2, 3], protocol=2), "holds list"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, data, told):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [[1, 2], {"model": {"epoch": 3}}, {"model": torch.nn.Linear(1, 1).state_dict, "x": 1}, {}])
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


@pytest.mark.parametrize(("size", "stride"), [((10**12,), (1,)), ((10**12,), (0,)), ((2**62,), (1,)), ((2**31, 2**31), (0, 0))])
def test_pickled_tensors_with_made_up_shapes_allocate_nothing(tmp_path, size, stride):
    torch.save({"model": {"w": Shaped(size, stride)}}, tmp_path / "x.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        open_source(tmp_path / "x.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB


def test_a_zip_bomb_is_refused_packed(tmp_path, files):
    with zipfile.ZipFile(files["encoder"][0]) as source, zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    with pytest.raises(UserError, match="compressed"):
        open_source(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "[red]markup[/red]", "\n", ""])
def test_odd_names_of_tensors_are_only_names(tmp_path, encoder, name):
    torch.save({**encoder, name: torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="unexpected"):
        load_backbone(tmp_path / "x.pth")


def test_quantised_and_sparse_weights_are_refused(tmp_path, encoder):
    torch.save({**encoder, "norm.bias": torch.zeros(192).to_sparse()}, tmp_path / "sparse.pth")
    save_file({**encoder, "norm.bias": torch.zeros(192).to(torch.float8_e4m3fn)}, tmp_path / "float8.safetensors")
    for name in ("sparse.pth", "float8.safetensors"):
        with pytest.raises(UserError):
            load_backbone(tmp_path / name)


def test_a_pinned_digest_must_match(files):
    path = files["encoder"][0]
    digest = file_digest(path)
    assert load_backbone(path, sha256=digest.upper())[2].digest == digest
    with pytest.raises(UserError, match=digest):
        load_backbone(path, sha256="0" * 64)
