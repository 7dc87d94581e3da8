"""Linear probing: a linear classifier on frozen features (arXiv 2111.06377, Table 10)."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import nn

from mae_bench.data.loader import Batch, seed_everything, seed_of
from mae_bench.data.transforms import normalize
from mae_bench.engine.trainer import Trainer
from mae_bench.job import Job, Outcome
from mae_bench.progress import Progress
from mae_bench.spec import BackboneSpec
from tasks.imagenet.classify import Classifier, load_at_size, open_data, order_of, score, stream
from tasks.imagenet.config import LinearProbeConfig

HEAD_STD = 0.01
BATCH_NORM_EPS = 1e-6


class Probe(nn.Module):
    """A frozen backbone in eval mode, BatchNorm without affine parameters, a linear head. Its parameters are the head's alone."""

    def __init__(self, backbone: Classifier, num_classes: int):
        super().__init__()
        self._backbone = [backbone.requires_grad_(False).eval()]  # in a list: no part of the module, so no train() and no state
        width = backbone.head.in_features
        self.norm = nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> logits (N, K)."""
        with torch.no_grad():
            features = self._backbone[0].features(imgs)
        return self.head(self.norm(features))


def run(config: LinearProbeConfig, job: Job, progress: Progress) -> Outcome:
    """Trains the head by LARS under weak augmentation (crop and flip) and scores the last epoch. Main metric top1."""
    data = open_data(config)
    device = torch.device(job.device)
    num_classes = len(data.report.classes)
    seed_everything(seed_of(job.seed, 0, -5))
    vit, spec, report = load_at_size(config, job.backbone)
    model = Probe(Classifier(vit, spec, num_classes, config.global_pool, fc_norm=False).to(device), num_classes).to(device)
    order = order_of(config, data, job.seed)
    trainer = Trainer(job, config, model, partial(lars, config=config), order.steps_per_epoch, progress, data.bad_train)
    order = replace(order, sizes=trainer.accumulation.sizes)
    trainer.fit(stream(data, config, order, spec, auto_augment=None), partial(_loss, spec, device))
    return score(trainer.full_model(), trainer, data, config, spec, report, job, progress)


def lars(model: nn.Module, config: LinearProbeConfig) -> Lars:
    """LARS as the reference's (util/lars.py): trust scaling and weight decay for matrices, plain momentum SGD for 1-D
    parameters."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors, "weight_decay": 0.0}]
    return Lars(groups, lr=config.base_lr, momentum=config.momentum, weight_decay=config.weight_decay)


def _loss(spec: BackboneSpec, device: torch.device, model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
    imgs = normalize(batch.imgs.to(device, non_blocking=True), spec.mean, spec.std)
    return F.cross_entropy(model(imgs), batch.targets.to(device, non_blocking=True))
