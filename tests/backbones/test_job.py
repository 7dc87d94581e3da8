"""The checkpoint job: a foreign file becomes an export that transfers load, with its origin in the record."""

import json

import pytest
import torch

from backbones.classifier import has_head
from backbones.config import CheckpointConfig
from backbones.describe import describe
from backbones.job import run
from backbones.load import load_backbone
from backbones.reading.safe import read_file
from mae_bench.config import build
from mae_bench.errors import UserError
from mae_bench.files import file_digest
from mae_bench.job import Job
from mae_bench.progress import Progress
from tests.backbones.formats import toys_deit

pytestmark = pytest.mark.usefixtures("toy_heads")


def job_of(tmp_path, **config) -> tuple[CheckpointConfig, Job]:
    value = {"kind": "checkpoint", **config}
    return build(CheckpointConfig, value, "test"), Job("x", "checkpoint", value, tmp_path / "cell", 0)


def test_the_export_is_the_checkpoint(tmp_path, files):
    path = files["full"][0]
    config, job = job_of(
        tmp_path, source=str(path), sha256=file_digest(path), spec={"pretrain_data": "ImageNet-1K"}
    )
    outcome = run(config, job, Progress())
    model, spec, report = load_backbone(f"run:{job.dir}")
    expected = load_backbone(path)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert (outcome.backbone_digest, outcome.conversion_report["digest"]) == (
        report.digest,
        file_digest(path),
    )
    assert outcome.backbone_spec == spec.to_dict()
    assert (spec.pretrain_method, spec.pretrain_data, outcome.dataset) == (
        "mae",
        "ImageNet-1K",
        "ImageNet-1K",
    )
    assert set(outcome.metrics) == {"params"}
    assert outcome.metrics["params"].value == sum(p.numel() for p in model.parameters())


def test_an_export_whose_description_was_changed_is_not_loaded(tmp_path, files):
    config, job = job_of(tmp_path, source=str(files["full"][0]))
    run(config, job, Progress())
    path = job.dir / "export/backbone.json"
    described = json.loads(path.read_text())
    described["spec"]["norm_eps"] = 1e-5
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"backbone\.json has digest") as error:
        load_backbone(f"run:{job.dir}")
    assert "remove its key 'seal'" in error.value.fix
    with pytest.raises(UserError, match=r"backbone\.json has digest"):
        describe(build(CheckpointConfig, {"kind": "checkpoint", "source": str(job.dir)}, "test"))
    del described["seal"]
    path.write_text(json.dumps(described))
    assert load_backbone(f"run:{job.dir}")[1].norm_eps == 1e-5


def test_the_source_is_read_once_for_backbone_and_head(tmp_path, files, monkeypatch):
    """It may be large, and a trusted pickle could make something else the second time."""
    path, opened = files["timm.safetensors"][0], []

    def read(path, *rest):
        opened.append(path)
        return read_file(path, *rest)

    monkeypatch.setattr("backbones.reading.source.read_file", read)
    config, job = job_of(tmp_path, source=str(path))
    run(config, job, Progress())
    assert has_head(job.dir)
    assert opened == [path]


def test_a_head_that_cannot_be_kept_does_not_cost_the_backbone(tmp_path):
    path, options = toys_deit.write(tmp_path)["distilled"]
    config, job = job_of(tmp_path, source=str(path), **options)
    outcome = run(config, job, Progress())
    assert load_backbone(f"run:{job.dir}")[1].num_prefix_tokens == 2
    assert not has_head(job.dir)
    assert any("classifier was not exported" in note and "two heads" in note for note in outcome.notes)


def test_a_wrong_digest_leaves_no_export(tmp_path, files):
    config, job = job_of(tmp_path, source=str(files["full"][0]), sha256="0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        run(config, job, Progress())
    assert not (job.dir / "export").exists()


def test_the_config_is_closed(tmp_path):
    for wrong in ({"source": "x", "sha": "0"}, {}, {"source": "x", "sha256": "abc"}):
        with pytest.raises(UserError):
            job_of(tmp_path, **wrong)
