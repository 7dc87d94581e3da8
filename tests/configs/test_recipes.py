"""Each packaged config builds, states its command, and is the published recipe that its name promises."""

import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_core import to_jsonable_python

from leaderboard.published import load_published
from mae_bench.config import CONFIGS, build, find_variants, list_configs, load_yaml
from mae_bench.data.sets.listed import PUBLISHED
from mae_bench.pretrain.config import ModelConfig, PretrainConfig
from mae_bench.suite.config import complete_job, load_suite
from tasks.imagenet.data import TRANSFER_SETS

GIVEN = {"target_tokens": ["tokenizer=file.pt"]}  # what a config leaves to the command
FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))
NAMES = [Path(name) for name in list_configs()]
JOBS = [path for path in NAMES if path.parts[0] in ("pretrain", "ablations", "tasks")]
SIZES = {
    "tiny": (192, 12, 3, 16),
    "small": (384, 12, 6, 16),
    "base": (768, 12, 12, 16),
    "large": (1024, 24, 16, 16),
}
SIZES["huge"] = (1280, 32, 16, 14)  # width, depth, heads, patch
SIZE_NAMES = {"base": "ViT-B/16", "large": "ViT-L/16", "huge": "ViT-H/14"}
EXPECTED = {"imagenet-1k": "ImageNet-1K", "places205": "Places205", "places365": "Places365"}
EXPECTED |= {f"inat-{year}": f"iNaturalist {year}" for year in (2017, 2018, 2019)}
TRANSFERS = {name.replace("-", ""): name for name in EXPECTED if name != "imagenet-1k"}
PAPER = [path.stem for path in NAMES if path.match("pretrain/vit_*")]


@cache
def job(path: Path | str) -> dict[str, Any]:
    value = load_yaml(str(path), GIVEN.get(Path(path).stem, []))
    return complete_job(str(path), value if value["kind"] == "random" else value | {"data": "somewhere"})


def test_every_name_still_resolves() -> None:
    """Commands in papers and scripts go on working: a name may be added, never lost."""
    names = (Path(__file__).parent / "names.txt").read_text(encoding="utf-8").split()
    assert set(names) <= {str(path) for path in NAMES}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_copied_config_resolves_anywhere(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(CONFIGS / path, tmp_path / path.name)
    for stem in list(find_variants(CONFIGS / path))[:1] or [path.stem]:
        own, packaged = Path(f"{stem}.yaml"), path.with_name(f"{stem}.yaml")
        overrides = ["data.root=x"] if path.parts[0] == "suites" else GIVEN.get(stem, [])
        assert load_yaml(own, overrides) == load_yaml(packaged, overrides)


def test_folders_of_the_user_replace_no_part_of_a_packaged_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_yaml("pretrain/own_images.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vit_base_patch16.yaml").write_text("depth: 1\n")
    assert load_yaml("pretrain/own_images.yaml") == before


def without(value: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in keys}


@pytest.mark.parametrize("path", JOBS, ids=str)
def test_every_job_builds(path: Path) -> None:
    assert job(path)["protocol"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("models/*.yaml")), ids=lambda path: path.stem)
def test_every_model_builds(path: Path) -> None:
    model = build(ModelConfig, load_yaml(path), path.stem)
    if found := re.match(r"vit_(tiny|small|base|large|huge)_patch(\d+)$", path.stem):
        width, depth, heads, patch = SIZES[found[1]]
        assert (model.embed_dim, model.depth, model.num_heads) == (width, depth, heads)
        assert model.patch_size == (patch, patch) == (int(found[2]),) * 2
        assert (model.img_size, model.in_chans, model.mlp_ratio) == ((224, 224), 3, 4.0)


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "models"], ids=str)
def test_every_config_opens_with_what_it_is_and_a_command_that_names_it(path: Path) -> None:
    head = re.match(r"(#.*\n)+", (CONFIGS / path).read_text(encoding="utf-8"))
    assert head, "opens with what it is"
    command = re.search(r"# Command:  (mae-bench .*)", head[0])
    assert command
    words = shlex.split(command[1].split("        ")[0])
    template = re.search(r"^grid: (.*)", (CONFIGS / path).read_text(encoding="utf-8"), re.MULTILINE)
    named = path.with_name(f"{template[1]}.yaml") if template else path  # a grid's command has its axes in it
    own = str(named) if words[1] != "evaluate" else str(named.relative_to("tasks").with_suffix(""))
    assert own in words or words[1:] == ["demo"]
    assert re.search(r"^# (Cost|Expect)", head[0], re.MULTILINE)


@pytest.mark.parametrize("name", PAPER)
def test_a_pretraining_is_the_papers_table_8(name: str) -> None:
    found = re.fullmatch(r"vit_(\w+?)_(\d+)ep(_normpix)?", name)
    assert found
    config = build(PretrainConfig, job(f"pretrain/{name}.yaml"), name)
    width, depth, heads, patch = SIZES[found[1]]
    assert (config.model.embed_dim, config.model.depth, config.model.num_heads) == (width, depth, heads)
    assert config.model.patch_size == (patch, patch)
    assert (config.epochs, config.warmup_epochs) == (int(found[2]), 40)
    assert config.norm_pix_loss == bool(found[3])
    assert config.protocol == f"mae-{found[2]}ep" + ("-normpix" if found[3] else "")
    assert config.base_lr * config.global_batch_size / 256 == pytest.approx(2.4e-3)
    assert (config.global_batch_size, config.weight_decay, config.betas, config.min_lr) == (
        4096,
        0.05,
        (0.9, 0.95),
        0,
    )
    assert (config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads) == (512, 8, 16)
    assert (config.mask_ratio, config.mask_sampling, config.target, config.loss_on) == (
        0.75,
        "random",
        "pixels",
        "masked",
    )
    assert (config.augment, config.crop_scale, config.color_jitter) == ("resized_crop", (0.2, 1.0), 0)
    assert (config.clip_grad, config.amp_dtype, config.encoder_mask_tokens) == (None, "bfloat16", False)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_the_paper_has_three_lengths_with_and_without_normalised_pixels(size: str) -> None:
    own = {name for name in PAPER if f"_{size}_" in name}
    assert own == {f"vit_{size}_{epochs}ep{norm}" for epochs in (400, 800, 1600) for norm in ("", "_normpix")}


@pytest.mark.parametrize(
    ("size", "epochs", "drop_path", "official"),
    [
        ("base", 100, 0.1, {"base_lr": 5e-4, "layer_decay": 0.65}),
        ("large", 50, 0.1, {"drop_path": 0.2}),
        ("huge", 50, 0.2, {"drop_path": 0.3}),
    ],
)
def test_fine_tuning_is_table_9_and_fine_tune_md_is_another_protocol(
    size: str, epochs: int, drop_path: float, official: dict[str, float]
) -> None:
    paper, theirs = (
        job(f"tasks/imagenet/finetune_vit_{size}_{whose}.yaml") for whose in ("paper", "official")
    )
    want: dict[str, Any] = {
        "base_lr": 1e-3,
        "weight_decay": 0.05,
        "betas": [0.9, 0.999],
        "layer_decay": 0.75,
        "global_batch_size": 1024,
    }
    want |= {
        "warmup_epochs": 5,
        "epochs": epochs,
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "drop_path": drop_path,
    }
    want |= {
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.0,
        "min_lr": 0.0,
        "protocol": f"finetune-{epochs}ep",
    }
    assert {key: paper[key] for key in want} == want
    changed = {key: theirs[key] for key in theirs if theirs[key] != paper[key]}
    assert changed == {
        **official,
        "protocol": f"finetune-{epochs}ep-official",
        "min_lr": 1e-6,
        "random_erasing": 0.25,
    }


def test_linear_probing_is_table_10() -> None:
    paper, short = job("tasks/imagenet/linear_paper.yaml"), job("tasks/imagenet/linear_50ep.yaml")
    want: dict[str, Any] = {
        "base_lr": 0.1,
        "weight_decay": 0.0,
        "momentum": 0.9,
        "global_batch_size": 16384,
        "warmup_epochs": 10,
        "epochs": 90,
    }
    want |= {"crop_scale": [0.08, 1.0], "global_pool": "token", "protocol": "linear-90ep"}
    assert {key: paper[key] for key in want} == want
    assert without(short, "epochs", "protocol") == without(paper, "epochs", "protocol")
    assert (short["epochs"], short["protocol"]) == (50, "linear-50ep")


@pytest.mark.parametrize(
    ("size", "epochs", "drop_path"), [("base", 300, 0.1), ("large", 200, 0.2), ("huge", 200, 0.2)]
)
def test_supervised_training_is_table_11(size: str, epochs: int, drop_path: float) -> None:
    config = job(f"tasks/imagenet/supervised_vit_{size}_paper.yaml")
    want: dict[str, Any] = {
        "base_lr": 1e-4,
        "weight_decay": 0.3,
        "betas": [0.9, 0.95],
        "global_batch_size": 4096,
        "warmup_epochs": 20,
    }
    want |= {
        "epochs": epochs,
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "drop_path": drop_path,
        "ema_decay": 0.9999,
    }
    want |= {"auto_augment": "rand-m9-mstd0.5-inc1", "protocol": f"supervised-{epochs}ep"}
    assert {key: config[key] for key in want} == want
    assert config["model"]["embed_dim"] == SIZES[size][0]


@pytest.mark.parametrize(
    "path",
    [path for path in NAMES if path.match("tasks/imagenet/*_vit_*")] + ["tasks/imagenet/linear_paper.yaml"],
)
def test_a_published_recipe_is_called_as_its_published_numbers(path: Path) -> None:
    """Scores of ours then stand under the name that the quoted rows have."""
    dataset = EXPECTED[job(path)["expect"]]
    assert job(path)["protocol"] in {row.protocol for row in load_published() if row.dataset == dataset}


@pytest.mark.parametrize("dataset", TRANSFERS)
@pytest.mark.parametrize("size", ["base", "large", "huge", "huge_448"])
def test_a_transfer_is_the_recipe_of_imagenet_under_a_name_of_its_own(dataset: str, size: str) -> None:
    own = f"tasks/imagenet/transfer_{dataset}_vit_{size}.yaml"
    base = job(f"tasks/imagenet/finetune_vit_{size}{'' if size == 'huge_448' else '_paper'}.yaml")
    changed = {"protocol": "transfer-448" if size == "huge_448" else "transfer", "expect": TRANSFERS[dataset]}
    assert job(own) == base | changed
    backbone = f"{SIZE_NAMES[size.removesuffix('_448')]}{' at 448' if size == 'huge_448' else ''}"
    (quoted,) = (
        row.value
        for row in load_published()
        if (row.dataset, row.backbone) == (EXPECTED[TRANSFERS[dataset]], backbone)
        and (row.source, row.place) == ("arXiv 2111.06377", "Table 6")
    )
    header, *lines = (
        (CONFIGS / "tasks/imagenet/transfer.yaml")
        .read_text(encoding="utf-8")
        .split("# Expect")[1]
        .splitlines()
    )
    names = next(line for line in lines if line.startswith("#      ")).strip("# ").split()
    (row,) = (line.split()[2:] for line in lines if line.startswith(f"#   {dataset} "))
    assert dict(zip(names, row, strict=True))[f"vit_{size}"] == str(quoted)


@pytest.mark.parametrize("dataset", TRANSFERS)
def test_a_linear_transfer_is_the_papers_probe(dataset: str) -> None:
    found, paper = (
        job(f"tasks/imagenet/{name}.yaml") for name in (f"transfer_{dataset}_linear", "linear_paper")
    )
    assert found == paper | {"protocol": "transfer-linear", "expect": TRANSFERS[dataset]}


@pytest.mark.parametrize("name", TRANSFERS.values())
def test_the_sets_of_the_transfers_are_known(name: str) -> None:
    assert name in TRANSFER_SETS
    assert EXPECTED[name] in {published.name for published in PUBLISHED}, (
        "records then say it as the quoted rows"
    )


def test_own_images_change_a_few_lines_of_the_paper() -> None:
    own, paper = job("pretrain/own_images.yaml"), job("pretrain/vit_base_400ep_normpix.yaml")
    assert {key for key in own if own[key] != paper[key]} == {
        "protocol",
        "warmup_epochs",
        "global_batch_size",
    }


def test_the_paper_and_the_demo_are_never_one_protocol() -> None:
    suites = {
        name: load_suite(f"suites/{name}.yaml", ["data.root=x"]) for name in ("paper_table1", "demo_table1")
    }
    paper, demo = (
        {j["protocol"] for j in (*s.backbones.values(), *s.tasks.values())} for s in suites.values()
    )
    assert not paper & demo


def test_the_documentation_has_every_key_with_its_default_and_the_papers_value() -> None:
    page = (CONFIGS.parent / "docs" / "pretraining.md").read_text(encoding="utf-8").split("## Every key")[1]
    table = {
        key: (default, paper)
        for key, default, paper in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", page, re.MULTILINE)
    }
    fields, paper = PretrainConfig.model_fields, job("pretrain/vit_large_800ep.yaml")
    assert set(table) == set(fields)
    for key, (default, papers) in table.items():
        found = "required" if fields[key].is_required() else yaml.safe_load(default.strip("`"))
        assert found == (default if fields[key].is_required() else to_jsonable_python(fields[key].default)), (
            key
        )
        if papers.startswith("`"):
            assert yaml.safe_load(papers.strip("`")) == paper[key], key
        else:
            assert papers == "-" or key == "model"
