"""Suggest the numbers of attention heads that a file does not state, by comparing all of them on images.

With MAE's decoder by the reconstruction loss, without it by the probe that suggests preprocessing.

Shapes: N images, C channels, H W image, L patches, M removed patches.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from backbones.load import ReadOptions, load_backbone, translate
from backbones.mae import GIVE_DECODER, Weights, build_autoencoder, get_reference_heads, read_autoencoder
from backbones.probe import Probe, build_probe, check_num_images, draw_sample
from backbones.reading.source import Checkpoint, open_source
from backbones.translating.heads import MIN_HEAD_DIM
from backbones.translating.infer import GIVE, MissingHeads
from mae_bench.data.batches.transforms import normalize
from mae_bench.errors import UserError
from mae_bench.intervals import paired_interval
from mae_bench.models.mae import MAE
from mae_bench.models.masking import build_masking
from mae_bench.models.targets import Pixels
from mae_bench.pretrain.reconstruct import build_centre_crop, draw_noise
from mae_bench.spec import BackboneSpec

ENCODER, DECODER = "num_heads", "decoder_num_heads"
MASK_RATIO, SEED = 0.75, 0  # of the masks, which all candidates share
MAX_RECONSTRUCTED, MAX_PROBED = 64, 256  # images; with more, trying all candidates takes long
MAX_ROWS = 12  # of the printed table
PROBE_NOTE = (
    "The file has no decoder whose loss could be compared. This score is not what the weights were trained "
    "for and weaker evidence: check the number against the code that trained them."
)
PIXELS = {False: "plain", True: "normalised"}  # norm_pix_loss
Pair = tuple[int, int | None]  # heads of the encoder, and of the decoder if there is one
Losses = tuple[dict[Pair, torch.Tensor], torch.Tensor]  # of each pair and of a constant, per image (N,)


@dataclass(frozen=True)
class Candidate:
    """Numbers of heads and their mean score.

    behind: difference to the best candidate, paired per image; low, high: its 95 % interval.
    """

    num_heads: int
    decoder_num_heads: int | None
    score: float
    behind: float
    low: float
    high: float

    @property
    def ties(self) -> bool:
        """Whether the interval includes the best candidate."""
        return not self.low > 0  # also for NaN


@dataclass(frozen=True)
class Suggestion:
    """Candidates, best first. They are only reported, never applied.

    fields: the numbers that are missing, of `num_heads` and `decoder_num_heads`.
    learned: whether the best candidate reconstructs better than a constant, as untrained weights do not.
    notes: what the scores depend on.
    """

    fields: tuple[str, ...]
    measure: str
    images: int
    candidates: list[Candidate]
    notes: tuple[str, ...]
    learned: bool = True

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    def list_others(self, field: str) -> list[Candidate]:
        """Return the candidates with another number than the best, best first."""
        return [row for row in self.candidates if getattr(row, field) != getattr(self.best, field)]

    def resolves(self, field: str) -> bool:
        """Whether the best candidate beats every other number beyond the interval."""
        others = self.list_others(field)
        return self.learned and bool(others) and not any(row.ties for row in others)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self) | {
            "best": {field: getattr(self.best, field) for field in self.fields},
            "resolved": {field: self.resolves(field) for field in self.fields},
            "verdict": [describe(self, field) for field in self.fields],
            "applied": False,
        }


@dataclass(frozen=True)
class Autoencoder:
    """An encoder with MAE's decoder, as `backbones.mae.read_autoencoder` returns it."""

    spec: BackboneSpec
    options: dict[str, Any]
    weights: Weights
    source: str

    def build(self, num_heads: int, decoder_num_heads: int) -> MAE:
        """Build the model with these numbers of heads; all share the weights."""
        options = self.options | {DECODER: decoder_num_heads}
        return build_autoencoder(replace(self.spec, num_heads=num_heads), options, self.weights, self.source)


def suggest_heads(
    source: str | Path, folder: str | Path, **options: Unpack[ReadOptions]
) -> Suggestion | None:
    """Compare the numbers of heads that are not known of `source` on images of `folder`.

    Return None if all are known. Candidates are the divisors of a width that leave at least `MIN_HEAD_DIM`
    channels per head; where both numbers are missing, every pair of encoder and decoder.

    options: `backbones.load.ReadOptions`. Raise UserError for fewer than `MIN_IMAGES` images.
    """
    # 1. Find the numbers that are missing; our own files state all of them.
    checkpoint = open_source(source, options.get("sha256"), options.get("weights"))
    if checkpoint.stated_spec:
        return None
    format, overrides = options.get("format"), dict(options.get("overrides") or {})
    fields: list[str] = []
    try:
        encoders = [translate(checkpoint, format, overrides)[2].num_heads]
    except MissingHeads as missing:
        encoders, fields = missing.plausible, [ENCODER]
    autoencoder = _read_autoencoder(checkpoint, format, overrides | {ENCODER: encoders[0]})
    decoders: list[int] = []
    if autoencoder is not None:
        try:
            decoders = [_get_decoder_heads(autoencoder)]
        except MissingHeads as missing:
            decoders, fields = missing.plausible, [*fields, DECODER]
    if not fields:
        return None

    # 2. Compare the candidates on the same images.
    if autoencoder is not None:
        return _compare_losses(autoencoder, fields, encoders, decoders, folder)
    return _compare_features(checkpoint, format, overrides, encoders, folder)


def _read_autoencoder(
    checkpoint: Checkpoint, format: str | None, overrides: Mapping[str, Any]
) -> Autoencoder | None:
    """Return the encoder with its decoder, or None for a file without a decoder like MAE's."""
    try:
        spec, options, tensors, _ = read_autoencoder(checkpoint, overrides, format)
        weights = {name: tensor.float() for name, tensor in tensors.items()}
        autoencoder = Autoencoder(spec, options, weights, checkpoint.source)
        autoencoder.build(spec.num_heads, 1)
    except UserError:
        return None
    return autoencoder


def _get_decoder_heads(autoencoder: Autoencoder) -> int:
    if DECODER in autoencoder.options:
        return int(autoencoder.options[DECODER])
    return get_reference_heads(autoencoder.weights, autoencoder.source)


def _compare_losses(
    autoencoder: Autoencoder, fields: list[str], encoders: list[int], decoders: list[int], folder: str | Path
) -> Suggestion:
    """Compare by the reconstruction loss, of plain or normalised pixels as the file states.

    If it does not, by the loss of those pixels of whose variance the best candidate explains more.
    """
    # 1. Load the images and draw their masks.
    imgs, positions = draw_sample(folder, MAX_RECONSTRUCTED).load_view(build_centre_crop(autoencoder.spec))
    check_num_images(len(imgs))
    model = autoencoder.build(encoders[0], decoders[0])
    noise = draw_noise(model, positions.tolist(), MASK_RATIO, SEED)

    # 2. Compute the losses.
    stated = autoencoder.options.get("norm_pix_loss")
    norms = [False, True] if stated is None else [stated]
    found = _compute_losses(autoencoder, norms, encoders, decoders, imgs, noise)
    shares = {norm: _explain(*losses) for norm, losses in found.items()}
    norm = max(norms, key=lambda norm: shares[norm])

    # 3. Rank the candidates.
    losses, constant = found[norm]
    rows = _rank(losses, lower_is_better=True)
    best = losses[rows[0].num_heads, rows[0].decoder_num_heads]
    notes = [_note_preprocessing(autoencoder.spec)]
    if stated is None:
        parts = " and ".join(f"{share:.0%} of {PIXELS[norm]} pixels" for norm, share in shares.items())
        notes.append(f"The file does not state norm_pix_loss; the best candidates explain {parts}.")
    return Suggestion(
        tuple(fields),
        f"reconstruction loss ({PIXELS[norm]} pixels)",
        len(imgs),
        rows,
        tuple(notes),
        learned=paired_interval(constant.tolist(), best.tolist())[0] > 0,
    )


@torch.no_grad()
def _compute_losses(
    autoencoder: Autoencoder,
    norms: list[bool],
    encoders: list[int],
    decoders: list[int],
    imgs: torch.Tensor,
    noise: torch.Tensor,
) -> dict[bool, Losses]:
    """Return the losses of all pairs of heads for each `norm_pix_loss`.

    imgs (N, C, H, W), uint8; noise (N, L).
    """
    device, spec = _get_device(), autoencoder.spec
    weights = {name: tensor.to(device) for name, tensor in autoencoder.weights.items()}
    autoencoder = replace(autoencoder, weights=weights)
    # Both halves of a pair are taken from models in which the other half has any number of heads.
    with_encoder = {heads: autoencoder.build(heads, decoders[0]) for heads in encoders}
    with_decoder = {heads: autoencoder.build(encoders[0], heads) for heads in decoders}
    inputs, masking = (
        normalize(imgs.to(device), spec.mean, spec.std),
        build_masking(noise.to(device), MASK_RATIO),
    )
    patches = with_encoder[encoders[0]].split_patches(inputs)
    targets = {norm: Pixels(spec, norm)(inputs, patches, None, masking.ids_masked) for norm in norms}
    losses: dict[bool, dict[Pair, torch.Tensor]] = {norm: {} for norm in norms}
    for heads, model in with_encoder.items():
        latent = model.encode(patches, masking)
        for decoder_heads, decoder in with_decoder.items():
            pred = decoder.decode(latent, masking, scored_only=True)
            for norm, target in targets.items():
                losses[norm][heads, decoder_heads] = _average(pred, target)
    return {norm: (losses[norm], _average(t.mean(dim=(0, 1)), t)) for norm, t in targets.items()}


def _average(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each image, (N,), in float64; pred, target (N, M, dim)."""
    return ((pred.double() - target.double()) ** 2).mean(dim=(1, 2)).cpu()


def _explain(losses: Mapping[Pair, torch.Tensor], constant: torch.Tensor) -> float:
    """Return the share of the targets' variance that the best candidate explains."""
    variance = float(constant.mean())
    return 1 - min(float(loss.mean()) for loss in losses.values()) / variance if variance else 0.0


def _compare_features(
    checkpoint: Checkpoint,
    format: str | None,
    overrides: Mapping[str, Any],
    encoders: list[int],
    folder: str | Path,
) -> Suggestion:
    """Compare by the probe, each number with the pooling and use of the final norm that suit it best."""
    probe: Probe | None = None
    right: dict[Pair, torch.Tensor] = {}
    for heads in encoders:
        given = {**overrides, ENCODER: heads}
        model, spec, _ = load_backbone(checkpoint, format=format, overrides=given)
        if probe is None:
            probe = build_probe(spec, draw_sample(folder, MAX_PROBED))
        scores = probe.score(model.to(_get_device()), spec, spec.mean, spec.std)
        right[heads, None] = max(scores.values(), key=lambda found: int(found.sum())).double()
    assert probe is not None, "there is at least one candidate"
    notes = (_note_preprocessing(spec), PROBE_NOTE)
    rows = _rank(right, lower_is_better=False)
    return Suggestion((ENCODER,), probe.measure, probe.num_images, rows, notes)


def _get_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _note_preprocessing(spec: BackboneSpec) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
    return f"The images are normalised with mean ({mean}) and std ({std})."


def _rank(scores: Mapping[Pair, torch.Tensor], *, lower_is_better: bool) -> list[Candidate]:
    """Return the candidates by their mean score; scores: of each image (N,)."""
    sign = 1 if lower_is_better else -1
    order = sorted(scores, key=lambda pair: sign * float(scores[pair].mean()))
    best, rows = scores[order[0]] * sign, []
    for pair in order:
        this = scores[pair] * sign
        low, high = paired_interval(this.tolist(), best.tolist())
        behind = float((this - best).mean())
        rows.append(Candidate(*pair, float(scores[pair].mean()), behind, low, high))
    return rows


def render(suggestion: Suggestion) -> RenderableType:
    """Render one row per candidate, and a verdict for each number."""
    table = Table(box=None, header_style="bold")
    for name in (*suggestion.fields, "score", "behind the best (95 %)"):
        table.add_column(name, justify="right")
    for row in suggestion.candidates[:MAX_ROWS]:
        numbers = [str(getattr(row, field)) for field in suggestion.fields]
        table.add_row(*numbers, f"{row.score:.4g}", "" if row is suggestion.best else _format(row))
    more = len(suggestion.candidates) - MAX_ROWS
    lines = [f"and {more} worse candidates, which --json lists"] if more > 0 else []
    lines += [describe(suggestion, field) for field in suggestion.fields]
    lines += [*suggestion.notes, "Nothing was applied."]
    title = Text(f"{suggestion.measure}, {suggestion.images} images", style="bold")
    return Group(title, table, *(Text(line) for line in lines))


def describe(suggestion: Suggestion, field: str) -> str:
    """State which number is suggested, how far the next one is behind and how to use it; or why none is."""
    best, others = getattr(suggestion.best, field), suggestion.list_others(field)
    if not others:
        why = f"{best} is the only number with at least {MIN_HEAD_DIM} channels per head"
    elif not suggestion.learned:
        why = "no candidate reconstructs these images better than a constant"
    elif suggestion.resolves(field):
        use = GIVE_DECODER.format(best) if field == DECODER else GIVE.format(f"{field}={best}")
        return (
            f"{field}={best} is suggested by the {suggestion.measure} of {suggestion.images} images "
            f"(next: {getattr(others[0], field)}, {_format(others[0])} behind). "
            f"To use it, {use}."
        )
    else:
        tied = next(row for row in others if row.ties)
        why = f"{best} is the best, but {getattr(tied, field)} is only {_format(tied)} behind"
    return f"{field} is not resolved by the {suggestion.measure} of {suggestion.images} images: {why}."


def _format(row: Candidate) -> str:
    return f"{row.behind:.3g} [{row.low:.3g}, {row.high:.3g}]"
