"""Describe what a result was computed with: package versions, git commit, hardware and command line."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CORE = (
    *("mae_bench", "torch", "torchvision", "timm", "numpy", "pillow", "pandas", "safetensors", "fvcore"),
    *("omegaconf", "pydantic", "rich", "typer", "tensorboard", "simplejpeg"),
)
DETECTRON2 = ("sal-detectron2", "detectron2")  # the wheel that needs no compiler; a build from source
OPTIONAL = (
    *DETECTRON2,
    *("pycocotools", "shapely", "onedl-mmsegmentation", "onedl-mmengine", "onedl-mmcv"),
    *("opencv-python-headless", "pyarrow"),
)
OPTIONAL_ORIGINALS = ("mmsegmentation", "mmengine", "mmcv", "mmcv-lite")  # which the onedl packages replace
GPU_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of drivers for NVIDIA, Windows (WSL) and AMD


def version_of(distribution: str) -> str:
    """Return the installed version of a distribution without importing it; "" if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


VERSION = version_of("mae_bench")


def versions() -> dict[str, str]:
    """Return the versions of Python and of every installed distribution that can influence a result."""
    found = {name: version_of(name) for name in (*CORE, *OPTIONAL, *OPTIONAL_ORIGINALS)}
    return {"python": platform.python_version()} | {name: number for name, number in found.items() if number}


def git_hash(file: str | Path = __file__) -> str:
    """Return the commit of the checkout of `file`, with "-dirty" if tracked files differ; "" outside one."""
    file = Path(file).resolve()
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return ""
    commit = _git(file.parent, "rev-parse", "HEAD") or ""
    return f"{commit}-dirty" if _git(file.parent, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git; None if git is missing or fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Return CPU model, usable cores, memory, and the GPUs that torch sees (if torch is imported)."""
    gpus = gpu_names()
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(terse=True),
        **({"gpus": gpus} if gpus else {}),
    }


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Return the name of the processor as reported by the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpu_names() -> list[str]:
    """Return the names of the GPUs that torch sees; none if torch is not imported."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def command_line() -> str:
    """Return the command quoted for a shell, without the path of the program."""
    return shlex.join(["mae-bench", *sys.argv[1:]])


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def visible_gpus() -> list[str]:
    """Return the GPUs that torch can use, as names for CUDA_VISIBLE_DEVICES.

    Another process asks torch, so that this one need not import it.
    """
    if not any(Path(node).exists() for node in GPU_NODES):
        return []
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    count = int(done.stdout) if done.returncode == 0 else 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in chosen.split(",")][:count] if chosen else [str(i) for i in range(count)]
