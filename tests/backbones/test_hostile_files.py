"""Hostile files, built byte by byte: each is refused in one sentence, with little memory and no crash."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backbones import hostile_files, hostile_pickles

ALLOWANCE = 32 << 20  # bytes that reading any file may take, beyond four times the file
HARMLESS = {  # what is read because nothing is wrong with the bytes
    "nothing of a huge shape": "no values, and no weight of any model",
    "many names": "as many as a file may have",
}
REASONS = {
    "many sets": "far more memory",
    "deep lists": "far more memory",
    "many tensors": "far more memory",
    "a text encoded again and again": "far more memory",
    "a state given again and again": "far more memory",
    "copies of collections.OrderedDict": "far more memory",
    "copies of addict.addict.Dict": "far more memory",
    "copies in torch.Size": "far more memory",
    "nested dictionaries": "repeat or nest without end",
    "doubled tuples": "repeat or nest without end",
    "doubled tuples as a key": "neither names nor numbers",
    "numbers that collide": "neither names nor numbers",
    "a list in itself": "contains itself",
    "a dictionary in itself": "contains itself",
    "bytearray of a size": "wants to build 'builtins.bytearray'",
    "torch.FloatStorage of a size": "of nothing but a size",
    "a shape": "over 16 stored bytes",
    "an offset": "over 16 stored bytes",
    "a far stride": "over 16 stored bytes",
    "a large storage": "claims 4398046511104 bytes",
    "a storage without values": "has no values",
    "compressed": "compressed",
    "overlapping entries": "overlapping",
    "two of one name": "two entries with the same name",
    "many entries": "more than 20000 entries",
    "huge": "more than 2097152",
    "a name twice": "two entries with the same name",
    "pip.main": "wants to build 'pip.main'",
    "numpy.testing._private.utils.runstring": "wants to build 'numpy.testing._private.utils.runstring'",
    "STACK_GLOBAL through the memo": "wants to build 'posix.system'",
    "INST": "the instruction INST",
    "EXT4": "the instruction EXT4",
    "PERSID": "the instruction PERSID",
    "NEWOBJ_EX": "wants to build 'subprocess.Popen'",
    "truncated after it ran": "wants to build 'posix.system'",
    "behind another pickle": "36 bytes after the end of its pickle at byte 136|wants to build 'posix.system'",
    "after the tensors": "36 bytes after the end of its tensors at byte 45",
    "good with bytes after its end": "bytes after its end",
    "good, encrypted in the directory": "encrypted",
    "good, another name in the header": "two descriptions of its entry 'archive/data.pkl'",
    "good with the member other.pkl": "it holds 'archive/other.pkl'",
    "good with a record that no tensor uses": "no tensor uses its entry data/1",
    "twice, good then evil": "two entries with the same name",
    "a pickle named x.safetensors": "wants to build 'posix.system'",
    "tar with a symbolic link": "a packed archive",
}


FAMILIES = hostile_files.families() | hostile_pickles.bypasses()
# Run each pickle that should create the canary, as a careless reader would; print the names of those that do.
RUN = """
import os, pickle, sys, time
for name, data in pickle.load(sys.stdin.buffer).items():
    try:
        pickle.loads(data)
    except Exception:
        pass
    for _ in range(100 if "OBJ" in name else 1):  # a process of its own
        if os.path.exists("canary"):
            os.remove("canary")
            print(name)
            break
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def ends(folder) -> list[tuple[str, str, int, str, int]]:
    """Family, name, bytes of the file, how reading it ended, bytes that it took."""
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-W",
        "ignore",
        hostile_files.__file__,
        str(folder),
    ]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        command, env=env, cwd=folder, stdout=subprocess.PIPE, text=True, check=True, timeout=600
    ).stdout
    return [tuple(json.loads(line)) for line in told.splitlines()]


def test_every_file_was_tried(ends):
    assert [(family, what) for family, what, *_ in ends] == [
        (family, what) for family, files in FAMILIES.items() for what in files
    ]
    assert len(ends) > 500


def test_nothing_of_them_was_run(ends, folder):
    assert not list(folder.glob("canary*"))


def test_they_would_run_elsewhere(tmp_path):
    """Otherwise the test above would prove nothing."""
    pickles = dict(hostile_pickles.instructions())
    careless = {name: pickles[name] for name in hostile_pickles.RUNNABLE}
    command = [sys.executable, "-I", "-c", RUN]
    output = subprocess.run(
        command, input=pickle.dumps(careless), cwd=tmp_path, capture_output=True, check=True, timeout=120
    ).stdout
    assert set(output.decode().splitlines()) == set(careless)


def test_the_same_bricks_in_good_order_are_read(ends):
    assert {end for family, _, _, end, _ in ends if family == "honest"} == {"read"}


def test_every_hostile_file_is_refused_as_a_users_mistake(ends):
    read = [(family, what, end) for family, what, _, end, _ in ends if family != "honest" and end == "read"]
    assert {what for _, what, _ in read} == set(HARMLESS)
    assert not [end for *_, end, _ in ends if end.startswith("!!")]
    assert not [end for *_, end, _ in ends if "report" in end]  # bugs to PyTorch, as its own messages ask for


@pytest.mark.parametrize(("what", "reason"), REASONS.items(), ids=REASONS)
def test_the_reason_is_told(ends, what, reason):
    found = [end for family, name, _, end, _ in ends if name == what and family != "honest"]
    assert found
    assert all(re.search(reason, end) for end in found), found


def test_no_file_takes_four_times_its_size(ends):
    assert not [(family, what, took) for family, what, size, _, took in ends if took > 4 * size + ALLOWANCE]
