"""The real `mae-bench` process: exit codes, answers for programs, and messages without a traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from mae_bench.cli.app import app, main
from mae_bench.files import file_digest

COMMANDS = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]


def mae_bench(
    *arguments: str, script: Path | None = None, cwd: Path | None = None, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `mae-bench` in a process of its own; with `script`, the one that knows the fake kinds.

    fresh: start an interpreter, where it matters what the process imports.
    """
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {"COLUMNS": "200", "PYTHONPATH": path, "NO_COLOR": "1"}
    if script is None and not fresh:
        done = run_in_fork(arguments, cwd, environment)
    else:
        done = subprocess.run(
            [sys.executable, *([str(script)] if script else ["-m", "mae_bench"]), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=cwd,
            env=os.environ | environment,
        )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done


def run_in_fork(
    arguments: Sequence[str], cwd: Path | None, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `main` in a fork of this process, which saves the start of an interpreter and the imports."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_main_of_fork(arguments, cwd, environment))
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


def _main_of_fork(arguments: Sequence[str], cwd: Path | None, environment: dict[str, str]) -> int:
    """Return the exit code; the output is on the file descriptors 1 and 2."""
    signal.alarm(120)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    os.environ.update(environment)
    os.chdir(cwd or os.curdir)
    with open(1, "w", closefd=False) as sys.stdout, open(2, "w", closefd=False) as sys.stderr:
        sys.argv = ["mae-bench", *arguments]
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


@pytest.fixture
def toy(suite: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(json.dumps(suite))
    return path


def test_help_imports_no_framework() -> None:
    """All commands in one process that has imported nothing before."""
    commands = [[], *([name] for name in COMMANDS), ["data", "check"], ["data", "pack"]]
    commands += [["data", "prepare", "imagenet"]]
    code = (
        "import json, sys; from mae_bench.cli.app import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['mae-bench', *command, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, (command, end.code)\n"
        "heavy = {'torch', 'numpy', 'timm', 'omegaconf', 'detectron2', 'mmseg', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: mae-bench") == len(commands)


def test_short_option_for_help() -> None:
    for command in ([], ["plan"], ["data", "check"]):
        assert mae_bench(*command, "-h").stdout == mae_bench(*command, "--help").stdout


def test_version() -> None:
    assert mae_bench("--version").stdout.startswith("mae-bench 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evalute"], "Did you mean 'evaluate'?"),
        (["run", "suites/demo.yaml", "--job", "2"], "--jobs"),
        (["run", "suites/dmo.yaml"], "did you mean suites/demo.yaml"),
        (["run"], "Missing argument 'SUITE'"),
        (["pretrain", "pretrain/demo.yaml", "epohcs=3", "data=x"], "the nearest known key is 'epochs'"),
        (["pretrain", "pretrain/demo.yaml"], "add data=VALUE to the command"),
        (["pretrain", "tasks/imagenet/linear_demo.yaml", "data=x"], "which transfers one"),
        (
            ["evaluate", "--checkpoint", "x.pth", "--tasks", "imagenet/linear"],
            "did you mean tasks/imagenet/linear",
        ),
        (
            ["evaluate", "--checkpoint", "x.pth", "--tasks", "imagenet/linear_demo"],
            "data.imagenet must be given",
        ),
        (["evaluate", "--checkpoint", "x.pth", "--tasks", "eval_only"], "data.imagenet must be given"),
        (
            ["evaluate", "--checkpoint", "x.pth", "--tasks", "imagenet/linear_demo", "data.root=y"],
            "x.pth is missing",
        ),
        (
            ["evaluate", "--checkpoint", "x.pth", "--tasks", "imagenet/linear_demo,mine/linear_demo.yaml"],
            "two of one name",
        ),
        (["pretrain", "pretrain/random_demo.yaml", "--device", "gpu"], "'gpu' is not one of"),
        (["report", "/nowhere"], "no result under /nowhere"),
        (["data", "check", "coco", "/nowhere"], "/nowhere is missing"),
        (["data", "check", "cocoa", "/nowhere"], "one of imagenet, coco, ade20k"),
        (["data", "check", "imagnet", "/nowhere"], "did you mean imagenet"),
        (["data", "pack", "/nowhere", "out"], "/nowhere"),
        (["data", "pack", "/nowhere", "out", "--original", "--short-side", "32"], "--original without them"),
        (["data", "prepare", "imagenet", "/nowhere", "out"], "ILSVRC2012_img_train.tar"),
        (["pretrain", "pretrain/demo.yaml", "data=x", "--processes", "0"], "--processes"),
        (
            ["reconstruct", "--checkpoint", "/nowhere", "--out", "x.png", "image.png"],
            "holds no masked autoencoder",
        ),
        (["inspect", "/nowhere.pth"], "/nowhere.pth"),
        (
            ["evaluate", "--checkpoint", "no/*.pth", "--tasks", "imagenet/linear_demo"],
            "no/*.pth matches nothing",
        ),
        (["evaluate", "--checkpoint", "no.yaml", "--tasks", "imagenet/linear_demo"], "no.yaml is missing"),
        (["verify", "/nowhere.pth", "--against", "timm:create_model"], "/nowhere.pth"),
        (["verify", "/nowhere.pth"], "Missing option '--against'"),
    ],
)
def test_wrong_use_is_2_and_says_what_to_do(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = mae_bench(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir()), "wrong use writes nothing"


@pytest.mark.parametrize(
    "override", ["seeds=[", "name='", "name={", "name=\tx", "name=\udcff", 'name="\\ud800"']
)
def test_an_override_that_is_not_text_or_not_yaml_is_wrong_use(tmp_path: Path, override: str) -> None:
    done = mae_bench("plan", "suites/demo.yaml", override, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr) < 400


def test_a_full_disk_is_1_and_named_with_its_path(
    fake_kinds: Path, toy: Path, suite: dict[str, Any], tmp_path: Path
) -> None:
    """The runner's own files: /dev/full takes what is written for what no disk has room for."""
    code = (
        "import os, sys, fake_kinds; from mae_bench import files; from mae_bench.cli.app import main\n"
        "from mae_bench.registry import KINDS; KINDS.update(fake_kinds.FAKES)\n"
        "fdopen = os.fdopen\n"
        "def full(handle, mode): os.close(handle); return open('/dev/full', mode)\n"
        "files.os.fdopen = full; sys.argv = ['mae-bench', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", code, "run", str(toy), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert "the disk is full" in answer["error"]
    assert str(Path(suite["out"]) / "suite.json") in answer["error"]
    assert "free some space and re-run the same command" in answer["fix"]
    assert "Traceback" not in done.stderr


def test_a_full_disk_behind_the_output_is_1() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mae_bench", "list", "models"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1].startswith("Expected: free space where this command writes")
    assert "Exception ignored" not in done.stderr


def test_a_piped_run_tells_how_far_it_is(fake_kinds: Path, toy: Path, suite: dict[str, Any]) -> None:
    """On stdout, or with --json, which is the answer alone, on stderr."""
    suite |= {"backbones": {"good": {"kind": "fake_maker", "behave": "wait"}}, "tasks": {}}
    toy.write_text(json.dumps(suite))
    code = (
        "import os, signal, sys, fake_kinds; from mae_bench.cli.app import main\n"
        "from mae_bench.registry import KINDS; KINDS.update(fake_kinds.FAKES)\n"
        "from mae_bench.runner import live; live.LINE_SECONDS = 0.1; tell = live.View._tell\n"
        "def stop_after(view, text):\n"
        "    tell(view, text)\n"
        "    if 'loss 1' in text: os.kill(os.getpid(), signal.SIGTERM)\n"
        "live.View._tell = stop_after; sys.argv = ['mae-bench', *sys.argv[1:]]; main()"
    )
    for options in ([], ["--json"]):
        command = [
            sys.executable,
            "-c",
            code,
            "run",
            str(toy),
            "--out",
            suite["out"] + str(len(options)),
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 130, done.stderr
        told = done.stderr if options else done.stdout
        assert re.search(r"good · fake_maker · seed 0: train \d+/1000, loss 1, ETA ", told)
        assert bool(options) != bool(done.stdout)


def test_a_run_that_is_done_is_0_and_ends_with_its_report(
    fake_kinds: Path, toy: Path, suite: dict[str, Any]
) -> None:
    done = mae_bench("run", str(toy), "baseline=base", "tasks.probe.score=61.5", script=fake_kinds)
    assert done.returncode == 0, done.stderr
    assert "4 cells: 4 done" in done.stdout
    for name in ("leaderboard.md", "leaderboard.html", "leaderboard.csv", "leaderboard.json"):
        path = Path(suite["out"]) / "report" / name
        assert str(path) in done.stdout
        assert path.is_file()
    assert "61.5" in done.stdout
    assert done.stderr.count("done") == 4


def test_a_run_with_a_failed_cell_is_1(fake_kinds: Path, toy: Path) -> None:
    done = mae_bench("run", str(toy), "tasks.probe.behave=user error", "--json", script=fake_kinds)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert [cell["state"] for cell in answer["cells"]] == ["done", "done", "failed", "failed"]
    assert answer["cells"][2]["fix"] == "mend it"
    assert "a given thing" in done.stderr


def test_a_cell_that_is_not_installed_is_no_failure(fake_kinds: Path, toy: Path) -> None:
    done = mae_bench("run", str(toy), "tasks.probe.behave=not installed", script=fake_kinds)
    assert done.returncode == 0, done.stderr
    assert "4 cells: 2 done, 2 not installed" in done.stdout
    assert "Next: pip install x" in done.stderr


def test_a_report_shows_the_cells_of_the_suite_alone(
    fake_kinds: Path, toy: Path, suite: dict[str, Any]
) -> None:
    mae_bench("run", str(toy), "tasks.probe.score=11.5", script=fake_kinds)
    done = mae_bench("run", str(toy), "tasks.probe.score=22.5", script=fake_kinds)
    assert "22.5" in done.stdout
    assert "11.5" not in done.stdout
    everything = mae_bench("report", suite["out"])
    assert "11.5" in everything.stdout
    assert "22.5" in everything.stdout
    assert "no differences" not in everything.stdout, "the suite's baseline is the report's"
    assert "no row named nobody" in mae_bench("report", suite["out"], "--baseline", "nobody").stdout


def test_a_plan_is_json_for_programs(fake_kinds: Path, toy: Path, suite: dict[str, Any]) -> None:
    cells = json.loads(mae_bench("plan", str(toy), "seeds=[0,1]", "--json", script=fake_kinds).stdout)[
        "cells"
    ]
    assert len(cells) == 6
    assert {cell["state"] for cell in cells} == {"left"}
    assert "6 cells: 6 left" in mae_bench("plan", str(toy), "seeds=[0,1]", script=fake_kinds).stdout
    assert not Path(suite["out"]).exists()


def test_one_backbone_can_be_made_alone(fake_kinds: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("kind: fake_maker")
    options = ("--out", str(tmp_path / "out"), "--seed", "3", "--device", "cpu")
    done = mae_bench("pretrain", str(config), "score=2", *options, script=fake_kinds)
    assert done.returncode == 0, done.stderr
    (export,) = (tmp_path / "out" / "cells" / "mine").glob("backbone-s3-*/export")
    assert str(export) in done.stdout


def test_a_plan_with_cells_that_would_fail_is_1(fake_kinds: Path, toy: Path, tmp_path: Path) -> None:
    done = mae_bench("plan", str(toy), f"data.root={tmp_path}/nowhere", script=fake_kinds)
    assert done.returncode == 1
    assert "would fail" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "x.pth", "out", "--to", "mea_bench"], "did you mean mae_bench?"),
        (["convert", "x.pth", "out.bin", "--to", "timm"], "a name that ends in .safetensors"),
        (["convert", "x.pth", "there", "--to", "mae_bench"], "there already exists"),
        (["inspect", "x.pth", "--format", "dinov4"], "did you mean dinov3"),
        (["verify", "x.pth", "--against", "no_module:build"], "no_module.py in this folder"),
    ],
)
def test_what_needs_no_torch_is_refused_before_it_is_imported(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "there").write_text("mine")
    code = (
        "import sys; from mae_bench.cli.app import main; sys.argv = ['mae-bench', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert message in done.stderr


def test_a_plan_imports_no_torch(fake_kinds: Path, toy: Path, suite: dict[str, Any]) -> None:
    toy.write_text(json.dumps(suite | {"backbones": {"mae": {"kind": "fake_pretraining"}}}))
    code = (
        "import sys; import fake_kinds\n"
        "from mae_bench.registry import KINDS; KINDS.update(fake_kinds.FAKES)\n"
        "from mae_bench.cli.app import main; sys.argv = ['mae-bench', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, "plan", str(toy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "global batch 8 = 1 device" in done.stdout


def test_a_pretraining_is_planned_as_it_would_run(toy_data: Path, tmp_path: Path) -> None:
    arguments = ("pretrain/own_images.yaml", f"data={toy_data / 'imagenet'}", "epochs=30", "--json")
    answers = [json.loads(mae_bench("plan", *arguments, cwd=tmp_path).stdout)]
    answers.append(json.loads(mae_bench("pretrain", *arguments, "--dry-run", cwd=tmp_path).stdout))
    assert answers[0] == answers[1]
    (cell,) = answers[0]["cells"]
    assert (cell["backbone"], cell["protocol"], cell["state"]) == ("own_images", "mae-own-images", "left")
    assert "SUITE" in mae_bench("plan", "--help").stdout
    assert "config of `pretrain`" in mae_bench("plan", "--help").stdout


@pytest.fixture
def hiding(tmp_path: Path) -> Path:
    """A working folder with modules of the user that are called as ours are."""
    for name in ("backbones", "leaderboard", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the module of the user')")
    (tmp_path / "tasks.py").write_text("raise SystemExit('the module of the user')")
    return tmp_path


def test_modules_in_the_working_folder_are_not_imported(hiding: Path, toy_data: Path) -> None:
    """Neither by the command nor by its workers."""
    out = ("--out", str(hiding / "out"), "--device", "cpu")
    done = mae_bench("pretrain", "pretrain/random_demo.yaml", *out, cwd=hiding, fresh=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "1 cells: 1 done" in done.stdout
    checked = mae_bench("data", "check", "imagenet", str(toy_data / "imagenet"), cwd=hiding, fresh=True)
    assert checked.returncode == 0, checked.stderr


def test_a_module_that_hides_ours_is_named(hiding: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hiding), root]))
    command = [sys.executable, "-m", "mae_bench", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert f"{hiding}/backbones/__init__.py hides the package 'backbones'" in done.stderr
    code = "import mae_bench; mae_bench.load_mae"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=hiding)
    assert f"{hiding}/backbones/__init__.py hides the package 'backbones'" in done.stderr


def test_the_package_lists_its_names() -> None:
    import mae_bench as package

    assert dir(package) == ["__version__", "create_mae", "load_mae"]
    assert mae_bench("--version").stdout == f"mae-bench {package.__version__}\n"
    with pytest.raises(AttributeError, match="no attribute 'load_mea'"):
        package.load_mea  # noqa: B018


def test_a_pretraining_on_two_processes(fake_kinds: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("kind: fake_pretraining")
    options = ("--out", str(tmp_path / "out"), "--processes", "2", "--device", "cpu", "--json")
    done = mae_bench("pretrain", str(config), *options, script=fake_kinds)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cells"][0]["score"] == 2.0
    assert "2 processes" in done.stderr


def test_a_refusal_is_json_for_programs(tmp_path: Path) -> None:
    done = mae_bench("data", "check", "coco", "/nowhere", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert "/nowhere is missing" in json.loads(done.stdout)["error"]
    assert "/nowhere is missing" in done.stderr


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mae_bench", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("mae-bench 0.")


def test_what_a_checkpoint_does_not_tell_can_be_given(tmp_path: Path) -> None:
    weights = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=0
    ).state_dict()
    save_file(weights, tmp_path / "odd.safetensors")
    asked = mae_bench("inspect", "odd.safetensors", cwd=tmp_path)
    assert asked.returncode == 2
    assert "give img_size=[H,W]" in asked.stderr
    asked = mae_bench("inspect", "odd.safetensors", "img_size=16", cwd=tmp_path)
    assert asked.returncode == 2
    assert "give num_heads=N" in asked.stderr
    given = ("img_size=[8,32]", "num_heads=3")
    told = mae_bench("inspect", "odd.safetensors", *given, "mean=[0.5,0.5,0.5]", "--json", cwd=tmp_path)
    spec = json.loads(told.stdout)["spec"]
    assert (spec["num_heads"], spec["img_size"], spec["mean"]) == (3, [8, 32], [0.5, 0.5, 0.5])
    done = mae_bench("convert", "odd.safetensors", "ours", *given, "--to", "mae_bench", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refused = mae_bench("convert", "ours", "odd.safetensors/out", "--to", "mae_bench", cwd=tmp_path)
    assert refused.returncode == 2
    assert "odd.safetensors/out" in refused.stderr


def test_data_check_answers_for_people_and_programs(toy_data: Path) -> None:
    found = json.loads(mae_bench("data", "check", "imagenet", str(toy_data / "imagenet"), "--json").stdout)
    assert found["splits"] == {"train": 2, "val": 2}
    assert found["classes"] == ["a", "b"]
    assert "2 classes" in mae_bench("data", "check", "imagenet", str(toy_data / "imagenet")).stdout


def test_data_check_tells_what_val_shares_with_train(toy_data: Path, tmp_path: Path) -> None:
    """The toy's one image a class is the same in both splits."""
    told = "2 of 2 images of val are also in train, byte for byte: a/val.png is a/train.png"
    assert told in mae_bench("data", "check", "imagenet", str(toy_data / "imagenet")).stdout
    assert (
        told
        in json.loads(mae_bench("data", "check", "imagenet", str(toy_data / "imagenet"), "--json").stdout)[
            "notes"
        ][0]
    )


def test_data_is_packed(toy_data: Path, tmp_path: Path) -> None:
    done = mae_bench(
        "data", "pack", str(toy_data / "imagenet"), str(tmp_path / "packed"), "--raw", "--num-workers", "0"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "packed")
    assert "train: 2 images, 0 left out" in done.stdout
    found = json.loads(mae_bench("data", "check", "imagenet", str(tmp_path / "packed"), "--json").stdout)
    assert found["splits"] == {"train": 2, "val": 2}


def test_images_that_do_not_decode_are_named(toy_data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "images"
    shutil.copytree(toy_data / "imagenet", broken)
    (broken / "train" / "a" / "broken.jpg").write_bytes(b"no image")
    assert mae_bench("data", "check", "images", str(broken)).returncode == 0, (
        "some may fail: each run says how many"
    )
    done = mae_bench("data", "check", "images", str(broken), "--decode")
    assert done.returncode == 1
    assert "train: a/broken.jpg does not decode: not an image format" in done.stdout
    packed = mae_bench("data", "pack", str(broken), str(tmp_path / "packed"), "--num-workers", "0")
    assert packed.returncode == 0
    assert "left out of train: a/broken.jpg: not an image format" in packed.stderr
    assert "train: 2 images, 1 left out because" in packed.stdout


def test_a_backbone_that_was_not_made_is_a_failure(toy_data: Path, tmp_path: Path) -> None:
    """Unlike a transfer whose packages are not installed, which is left out."""
    tracked = "trackers=[wandb]" if find_spec("wandb") is None else "trackers=[mlflow]"
    done = mae_bench(
        "pretrain",
        "pretrain/demo.yaml",
        f"data={toy_data / 'imagenet'}",
        tracked,
        "global_batch_size=2",
        "--out",
        str(tmp_path / "run"),
    )
    assert done.returncode == 1
    assert "is not installed" in done.stdout + done.stderr


def test_doctor_answers_in_json() -> None:
    done = mae_bench("doctor", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["problems"] == []


STATED = {
    "spec": json.dumps({"num_heads": 3, "img_size": [16, 16]})
}  # what the toys state, as metadata and as arguments
ARGS = {"args": {"model_kwargs": {"num_heads": 3, "img_size": 16}}}


@pytest.fixture
def vit(tmp_path: Path) -> VisionTransformer:
    """A small ViT, saved as vit.safetensors, and in several.pth beside its average."""
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0)
    save_file(model.state_dict(), tmp_path / "vit.safetensors", STATED)
    average = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    torch.save(
        {"state_dict": model.state_dict(), "state_dict_ema": average, "optimizer": {"lr": 1.0}, **ARGS},
        tmp_path / "several.pth",
    )
    return model


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`mae-bench` in this process and in tmp_path, which imports torch once: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mae-bench", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


def test_inspect_lists_several_sets_and_reads_the_chosen_one(
    tmp_path: Path, vit: VisionTransformer, here
) -> None:
    code, out, _ = here("inspect", "several.pth", "--json")
    assert (code, [row["weights"] for row in json.loads(out)["sets"]]) == (
        0,
        ["state_dict", "state_dict_ema"],
    )
    assert "--weights state_dict_ema" in here("inspect", "several.pth")[1]
    chosen = json.loads(here("inspect", "several.pth", "--weights", "state_dict_ema", "--json")[1])
    assert (chosen["format"], chosen["weights"], chosen["training_state"]) == (
        "timm",
        "state_dict_ema",
        ["optimizer"],
    )
    code, _, told = here("convert", "several.pth", "ours", "--to", "mae_bench", "--weights", "state_dict_ema")
    assert code == 0, told
    exported = load_file(tmp_path / "ours" / "backbone.safetensors")
    assert torch.equal(exported["norm.weight"], vit.state_dict()["norm.weight"] * 0.5)


@pytest.mark.parametrize("columns", ["40", "80"])
def test_what_is_copied_is_whole_in_a_narrow_terminal(
    tmp_path: Path, vit: VisionTransformer, here, monkeypatch, columns
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    name = "a_file_of_some_length_that_does_not_fit_a_line.safetensors"
    (tmp_path / "vit.safetensors").rename(tmp_path / name)
    told = json.loads(here("inspect", name, "--json")[1])
    assert f"{told['sha256']}  {name}" in here("inspect", name)[1].splitlines()
    deep = {
        f"{who}.module.backbone.with.a.long.prefix.{key}": t
        for who in ("student", "teacher")
        for key, t in vit.state_dict().items()
    }
    torch.save({"state_dict": deep, **ARGS}, tmp_path / "deep.pth")
    shown = [line.strip() for line in here("inspect", "deep.pth")[1].splitlines()]
    assert "--weights state_dict.student.module.backbone.with.a.long.prefix" in shown
    assert f"{file_digest(tmp_path / 'deep.pth')}  deep.pth" in shown


def test_inspect_suggests_how_to_feed(tmp_path: Path, vit: VisionTransformer, here) -> None:
    for number in range(16):
        place = tmp_path / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (15 * number, 0, 255 * (number % 2))).save(place / f"{number}.png")
    found = json.loads(here("inspect", "vit.safetensors", "--images", "images", "--json")[1])
    assert (found["suggestion"]["applied"], found["suggestion"]["images"]) == (False, 16)
    assert found["spec"]["mean"] == [0.485, 0.456, 0.406]
    _, shown, _ = here("inspect", "vit.safetensors", "--images", "images")
    assert "a suggestion from 16 images; nothing was applied." in shown
    assert "No published preprocessing is known" in shown
    code, _, told = here("inspect", "several.pth", "--images", "images")
    assert (code, "--weights NAME" in told) == (2, True)


def test_evaluate_names_the_nearest_files_for_one_that_is_missing(
    tmp_path: Path, vit: VisionTransformer, here
) -> None:
    code, _, told = here(
        "evaluate",
        "--checkpoint",
        "vti.safetensors",
        "--checkpoint",
        "facebook/vit-mae-base",
        "--tasks",
        "imagenet/linear_demo",
        "data.root=y",
    )
    assert (code, "did you mean vit.safetensors" in told, "hf:facebook/vit-mae-base" in told) == (
        2,
        True,
        True,
    )
    assert not (tmp_path / "runs").exists()


def test_verify_is_0_for_equal_models_and_1_for_others(tmp_path: Path, vit: VisionTransformer, here) -> None:
    (tmp_path / "theirs_in_cli.py").write_text(
        "from safetensors.torch import load_file\n"
        "from timm.models.vision_transformer import VisionTransformer\n"
        "def same(path):\n"
        "    sizes = dict(img_size=16, patch_size=8, embed_dim=192, depth=2, num_heads=3)\n"
        "    model = VisionTransformer(**sizes, num_classes=0)\n"
        "    model.load_state_dict(load_file(path))\n"
        "    return model\n"
        "def other(path):\n"
        "    model = same(path)\n"
        "    model.blocks[1].mlp.fc2.bias.data += 1\n"
        "    return model\n"
        "def breaks(path):\n"
        "    raise ValueError('their own trouble')\n"
    )
    code, out, told = here("verify", "vit.safetensors", "--against", "theirs_in_cli:same")
    assert code == 0, told
    assert "The models are equal within 1e-05" in out
    code, out, _ = here("verify", "vit.safetensors", "--against", "theirs_in_cli:other", "--json")
    assert (code, [layer["absolute"] > 0 for layer in json.loads(out)["layers"]]) == (
        1,
        [False, False, True, True],
    )
    assert here("verify", "vit.safetensors", "--against", "theirs_in_cli:other", "--tolerance", "9")[0] == 0
    code, _, told = here("verify", "vit.safetensors", "--against", "theirs_in_cli:breaks")
    assert (code, "ValueError: their own trouble" in told) == (2, True)


def test_a_bad_checkpoint_among_many_does_not_stop_the_others(
    tmp_path: Path, toy_data: Path, vit: VisionTransformer, here
) -> None:
    (tmp_path / "list.yaml").write_text(
        json.dumps([{"name": "ema", "source": "several.pth", "weights": "state_dict_ema"}])
    )
    save_file(
        {name: tensor for name, tensor in vit.state_dict().items() if name != "norm.bias"},
        tmp_path / "a_bad.safetensors",
        STATED,
    )
    given = [
        "--checkpoint",
        "a_*.safetensors",
        "--checkpoint",
        "list.yaml",
        "--tasks",
        "imagenet/linear_demo",
        "--out",
        "out",
    ]
    small = [
        "tasks.linear_demo.epochs=1",
        "tasks.linear_demo.warmup_epochs=0",
        "tasks.linear_demo.global_batch_size=2",
    ]
    code, out, told = here("evaluate", *given, f"data.root={toy_data}", *small, "device=cpu", "--json")
    assert code == 1, told
    cells = json.loads(out)["cells"]
    assert {(cell["backbone"], cell["task"]): cell["state"] for cell in cells} == {
        ("a_bad", "backbone"): "failed",
        ("ema", "backbone"): "done",
        ("a_bad", "linear_demo"): "failed",
        ("ema", "linear_demo"): "done",
    }
    assert "missing: norm.bias" in cells[0]["reason"]
    table = (tmp_path / "out" / "report" / "leaderboard.md").read_text()
    assert "ema" in table
    assert "missing: norm.bias" in table
    assert "4 cells: 2 done, 2 failed" in here("plan", "out/suite.json")[1]
