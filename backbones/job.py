"""Bring a foreign checkpoint into a suite: verify, translate and export it like a pretrained backbone."""

from pathlib import Path

from backbones.classifier import extract_head, has_head, load_head, write_head
from backbones.config import CheckpointConfig
from backbones.load import load_backbone
from backbones.reading.source import Checkpoint, open_source
from mae_bench.errors import UserError
from mae_bench.export import EXPORT, write_export
from mae_bench.job import Job, Outcome
from mae_bench.models.cost import backbone_gmacs, num_params
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec


def run(config: CheckpointConfig, job: Job, progress: Progress) -> Outcome:
    """Export the backbone of `config.source`; the only metric is its size.

    The outcome holds the digest of the export, which the transfer records refer to, and in the report that of
    the source.
    """
    progress.stage("load")
    checkpoint = open_source(config.source, config.sha256, config.weights)
    model, spec, report = load_backbone(checkpoint, format=config.format, overrides=config.spec)
    progress.stage("export")
    provenance = {"config": job.config, "converted": report.to_dict()}
    digest = write_export(job.dir / EXPORT, model.state_dict(), spec, provenance)
    notes = [*report.notes, *export_head(checkpoint, job.dir / EXPORT, spec)]
    return Outcome(
        task="pretrain",
        dataset=spec.pretrain_data,
        split="none",
        num_samples=1,
        main_metric="params",
        metrics={"params": Metric(num_params(model), "parameters", "lower")},
        data_digest="",
        backbone_spec=spec.to_dict(),
        backbone_digest=digest,
        conversion_report=report.to_dict(),
        cost={"params": num_params(model), "gmacs": backbone_gmacs(spec)},
        notes=notes,
    )


def export_head(checkpoint: Checkpoint, folder: Path, spec: BackboneSpec) -> list[str]:
    """Write the backbone's classifier, if it has one, for the protocols that do not train a head.

    Returns a note if the classifier cannot be written; the backbone is valid without it.
    """
    if has_head(checkpoint.source):
        write_head(folder, *load_head(checkpoint.source), spec)
        return []
    try:
        head = extract_head(checkpoint)
    except UserError as error:
        return [f"the classifier was not exported: {error.given}"]
    if head:
        checkpoint.check_unchanged()
        write_head(folder, head, [], spec)
    return []
