"""Run the authors' own model code on drawn weights and images, and store its features as golden files.

    python -m tests.foreign.make_golden --repos DIR --timm 0.3.2=DIR --timm 0.4.12=DIR [--tables] [FAMILY ...]

`--tables` makes `resampled.json`, the position tables at other sizes, from the models of the golden files.

`--repos` holds a checkout of each repository of `SOURCES` under its own name (DIR/mae, DIR/dino, ...),
`--timm` the unpacked wheels of the old timm versions that some of them need. Nothing is downloaded, and none
of their code is copied: a golden file contains names, shapes, seeds and numbers. Each family runs in a
process of its own, as their modules share names.
"""

import argparse
import collections.abc
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.foreign.authors import FAMILIES, Toy
from tests.foreign.drawing import draw_images, draw_noise, draw_state, fold_blocks, pick_values, unfold_blocks
from tests.foreign.resampling import CASES, double_precision

GOLDEN = Path(__file__).parent / "golden"
SEED = 11
NUM_IMGS = 2
# Family -> (repository, its folder under --repos, commit, folders to import from, version of timm; "" for the
# installed one).
SOURCES: dict[str, tuple[str, str, str, tuple[str, ...], str]] = {
    "mae": ("facebookresearch/mae", "mae", "efb2a8062c206524e35e47d04501ed4f544c0ae8", (".",), "0.3.2"),
    "mae_lite": (
        "wangsr126/MAE-Lite",
        "MAE-Lite",
        "a5d1a74865b661c0e3a91e3ab1d5331ad1deac9c",
        (".", "projects/mae_lite"),
        "0.4.12",
    ),
    "crossmae": ("TonyLianLong/CrossMAE", "CrossMAE", "ed0677a978a54c4dac3d28d54efb6b687c9d3dec", (".",), ""),
    "dino": ("facebookresearch/dino", "dino", "7c446df5b9f45747937fb0d72314eb9f7b66930a", (".",), ""),
    "ibot": ("bytedance/ibot", "ibot", "da316d82636a7a7356835ef224b13d5f3ace0489", (".",), ""),
    "dinov2": ("facebookresearch/dinov2", "dinov2", "b8931f7bf91576930313be2c6d6af376033b35f0", (".",), ""),
    "moco_v3": (
        "facebookresearch/moco-v3",
        "moco-v3",
        "c349e6e24f40d3fedb22d973f92defa4cedf37a7",
        (".",),
        "0.4.12",
    ),
    "deit": ("facebookresearch/deit", "deit", "7e160fe43f0252d17191b71cbb5826254114ea5b", (".",), "0.3.2"),
    "deit3": ("facebookresearch/deit", "deit", "7e160fe43f0252d17191b71cbb5826254114ea5b", (".",), "0.3.2"),
    "ijepa": ("facebookresearch/ijepa", "ijepa", "52c1ae95d05f743e000e8f10a1f3a79b10cff048", (".",), ""),
    "beit": ("microsoft/unilm", "unilm", "768a3c873f598bb9b4d4dfb9267b099e35f8fe56", ("beit",), "0.4.12"),
    "simmim": ("microsoft/SimMIM", "SimMIM", "d3e29bcac950b83edc34ca33fe4404f38309052c", (".",), "0.4.12"),
    "timm_032": ("huggingface/pytorch-image-models", "", "timm 0.3.2 from PyPI", (), "0.3.2"),
}


def stand_in() -> None:
    """Provide in memory what old code imports and today's torch and numpy no longer have."""
    six: Any = types.ModuleType("torch._six")
    six.container_abcs, six.inf, six.string_classes = collections.abc, float("inf"), str
    sys.modules["torch._six"] = six
    loguru: Any = types.ModuleType("loguru")  # MAE-Lite's logger
    loguru.logger = None
    sys.modules.setdefault("loguru", loguru)
    numpy: Any = np
    numpy.float = float


def make_record(toy: Toy) -> dict[str, Any]:
    """Return what a golden file keeps of a toy: layout, seed and features."""
    saved = (toy.shapes_from or toy.module).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in saved.items()}
    state = draw_state(shapes, SEED, toy.tables)
    check_tables(toy, saved, state)
    stored: torch.dtype = getattr(torch, toy.dtype)
    state = {name: t.to(stored) if t.is_floating_point() else t for name, t in state.items()}
    wide = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
    toy.module.double().eval()
    toy.module.load_state_dict(toy.prepare(wide) if toy.prepare else wide)
    record: dict[str, Any] = {
        "seed": SEED,
        "num_heads": toy.num_heads,
        "patch": toy.patch,
        "vit": toy.vit,
        "output": toy.output,
        "dtype": toy.dtype,
        "imgs": [NUM_IMGS, 3, *toy.size],
        "tables": toy.tables,
        "tensors": fold_blocks(shapes),
    }
    if toy.img_size:
        record["img_size"] = list(toy.img_size)
    if toy.note:
        record["note"] = toy.note
    imgs = draw_images(SEED, record["imgs"])
    with torch.no_grad():
        features = toy.tokens(toy.module, imgs)
        record |= {"shape": list(features.shape), "values": pick_values(features)}
        if toy.decoder is not None:
            num_patches = toy.size[0] // toy.patch * (toy.size[1] // toy.patch)
            pred = toy.decoder(toy.module, imgs, draw_noise(SEED, NUM_IMGS, num_patches))
            record |= {"decoder_heads": toy.decoder_heads, "pred": pick_values(pred)}
    return record


def check_tables(toy: Toy, saved: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Compare our fixed tables with those that the authors' code made, where its grid is square."""
    for name, table in () if toy.copies_table else toy.tables.items():
        square = table["grid"][0] == table["grid"][1]
        if table["kind"] in ("index", "moco") or square:
            theirs = saved[name].to(state[name].dtype)
            torch.testing.assert_close(state[name], theirs, rtol=0, atol=1e-6, msg=f"{toy.name}: {name}")


def import_from(family: str, repos: Path, timms: dict[str, str]) -> None:
    """Put a family's code, and the timm that it needs, on the import path."""
    _, folder, _, paths, timm = SOURCES[family]
    stand_in()
    sys.path[:0] = [str(repos / folder / path) for path in paths] + ([timms[timm]] if timm else [])


def make_tables(family: str) -> None:
    """Write the resampled tables of one family's code into resampled.json."""
    path = GOLDEN / "resampled.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name, (process, code, sizes, resample) in CASES.items():
        if process != family:
            continue
        file, _, model = name.partition("/")
        models = json.loads((GOLDEN / f"{file}.json").read_text())["models"]
        record = models[model]
        tensors = (
            record["tensors"] if isinstance(record["tensors"], dict) else models[record["tensors"]]["tensors"]
        )
        tables: dict[str, list[float]] = {}
        for size in sizes:
            state = draw_state(unfold_blocks(tensors), record["seed"], record["tables"])
            wide = {key: t.double() if t.is_floating_point() else t for key, t in state.items()}
            with double_precision():
                table = resample(wide, record, size)
            assert table.dtype == torch.float64, name
            tables["x".join(map(str, size))] = pick_values(table)
        found[name] = {"code": code, "tables": tables}
    lines = [
        f"{json.dumps(name)}: {json.dumps(found[name], separators=(',', ':'))}" for name in sorted(found)
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def make_family(family: str) -> None:
    """Write the golden file of one family."""
    repository, _, commit, _, timm = SOURCES[family]
    models: dict[str, Any] = {}
    layouts: dict[str, str] = {}
    for toy in FAMILIES[family]():
        record = make_record(toy)
        layout = json.dumps([record["tensors"], record["tables"]])
        first = layouts.setdefault(layout, toy.name)
        if first != toy.name:  # the same names and shapes are stored once
            record["tensors"] = first
        models[toy.name] = record
    content = {"family": family, "repository": repository, "commit": commit, "timm": timm, "models": models}
    write_golden(GOLDEN / f"{family}.json", content)
    print(f"{family}: {len(models)} models")


def write_golden(path: Path, content: dict[str, Any]) -> None:
    """Write one line per model, so that a change shows where it is."""
    models = content.pop("models")
    head = json.dumps(content)[:-1]
    lines = [
        f"{json.dumps(name)}: {json.dumps(record, separators=(',', ':'))}" for name, record in models.items()
    ]
    path.write_text(head + ', "models": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"by default all: {', '.join(SOURCES)}")
    parser.add_argument("--repos", type=Path, required=True, help="folder of the checked-out repositories")
    parser.add_argument(
        "--timm", action="append", default=[], metavar="VERSION=DIR", help="an unpacked timm wheel"
    )
    parser.add_argument("--tables", action="store_true", help="make resampled.json alone")
    args = parser.parse_args()
    families = args.families or list(SOURCES)
    if len(families) == 1:
        import_from(families[0], args.repos, dict(each.split("=", 1) for each in args.timm))
        make_tables(families[0]) if args.tables else make_family(families[0])
        return
    options = [part for each in args.timm for part in ("--timm", each)] + ["--tables"] * args.tables
    for family in families:
        subprocess.run(
            [sys.executable, "-m", __spec__.name, family, "--repos", args.repos, *options], check=True
        )


if __name__ == "__main__":
    main()
