"""What a result was made with: package versions, git commit, hardware and command line."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CORE = ("mae_bench", "torch", "torchvision", "timm", "numpy", "pillow", "pandas", "safetensors", "fvcore", "omegaconf",
        "pydantic", "rich", "typer", "tensorboard", "simplejpeg")  # fmt: skip
DETECTRON2 = (
    "sal-detectron2",
    "detectron2",
)  # the wheel that needs no compiler; a build of the upstream repository
OPTIONAL = (*DETECTRON2, "pycocotools", "shapely", "onedl-mmsegmentation", "onedl-mmengine", "onedl-mmcv",
            "opencv-python-headless", "pyarrow")  # fmt: skip
OPTIONAL_ORIGINALS = (
    "mmsegmentation",
    "mmengine",
    "mmcv",
    "mmcv-lite",
)  # what the onedl distributions stand in for
GPU_NODES = (
    "/dev/nvidiactl",
    "/dev/dxg",
    "/dev/kfd",
)  # where a driver for NVIDIA, Windows (WSL) or AMD shows itself


def version_of(distribution: str) -> str:
    """The installed version of a distribution, "" where it is not installed; nothing is imported."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


VERSION = version_of("mae_bench")


def versions() -> dict[str, str]:
    """Python's version and that of every distribution that has a part in a result and is installed."""
    found = {name: version_of(name) for name in (*CORE, *OPTIONAL, *OPTIONAL_ORIGINALS)}
    return {"python": platform.python_version()} | {name: number for name, number in found.items() if number}


def git_hash(file: str | Path = __file__) -> str:
    """The commit of the checkout that tracks `file`, with "-dirty" if tracked files differ from it; "" outside a checkout."""
    file = Path(file).resolve()
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return ""
    commit = _git(file.parent, "rev-parse", "HEAD") or ""
    return f"{commit}-dirty" if _git(file.parent, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where git is missing or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory, and the GPUs that torch sees (if torch is imported)."""
    gpus = gpu_names()
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(terse=True),
        **({"gpus": gpus} if gpus else {}),
    }


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpu_names() -> list[str]:
    """The GPUs that torch sees; none if torch is not imported."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def command_line() -> str:
    """The command as it was given, quoted for a shell; where the program lies is left out."""
    return shlex.join(["mae-bench", *sys.argv[1:]])


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def visible_gpus() -> list[str]:
    """The names, for CUDA_VISIBLE_DEVICES, of the GPUs that torch can use; another process asks torch: this one stays light."""
    if not any(Path(node).exists() for node in GPU_NODES):
        return []
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    count = int(done.stdout) if done.returncode == 0 else 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in chosen.split(",")][:count] if chosen else [str(i) for i in range(count)]
