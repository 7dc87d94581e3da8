"""Generate the scenes of all demo data sets: textured shapes, lit and occluded, on textured ground.

Dimensions: H W image, h w window of a thing, P points. Coordinates are (x, y) in pixels.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Array = npt.NDArray[Any]

GENERATOR_VERSION = 1  # increased whenever the same seed gives other pixels or labels
THINGS = ("arrow", "crescent", "cross", "disc", "heart", "hexagon", "ring", "square", "star", "triangle")
STUFF = ("sky", "gravel", "furrows", "water", "foliage")
GROUND_COLOURS = {
    "sky": (0.35, 0.5, 0.65),
    "gravel": (0.4, 0.38, 0.36),
    "furrows": (0.42, 0.27, 0.14),
    "water": (0.1, 0.3, 0.4),
    "foliage": (0.15, 0.38, 0.12),
}
SUPERSAMPLING = 4
NUM_PATTERNS = 5
TYPICAL_PATTERN = 0.8  # fraction of the things with their class's pattern
TYPICAL_GROUND = 0.5  # fraction of the things on their class's ground
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # weights of red, green and blue in brightness (Rec. 601)


@dataclass(frozen=True)
class Recipe:
    """Parameters of a data set's scenes; `radius` is relative to `size`, ranges are inclusive (low, high)."""

    size: int
    num_things: tuple[int, int] = (2, 6)
    radius: tuple[float, float] = (0.07, 0.3)
    turn: float = np.pi  # maximum rotation of things, to either side
    crowd_share: float = 0.0  # fraction of the scenes with a group of many small things of a class
    max_grounds: int = 3
    max_bars: int = 2
    ground_colour: float = (
        0.0  # fraction of the grounds in their class's typical colour instead of a random one
    )


@dataclass(frozen=True)
class Thing:
    """An object, or a crowd of objects of one class.

    outlines: full polygons, float (P, 2), including hidden parts and parts outside the image.
    mask: visible pixels, bool (H, W).
    full_area: number of pixels inside the image that would be visible without occlusion.
    """

    label: int  # index in THINGS
    outlines: tuple[Array, ...]
    mask: Array
    full_area: int
    crowd: bool = False

    @property
    def area(self) -> int:
        """Number of visible pixels."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Scene:
    """A scene.

    image: uint8 RGB, (H, W, 3).
    stuff: uint8 (H, W), 0 for void, else 1 + index in STUFF (also below things).
    """

    image: Array
    stuff: Array
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Light:
    """Light of a scene: unit vector towards the light, strength of shading, darkness of shadows."""

    direction: Array
    shading: float
    shadow: float


def build_rng(seed: int, data_set: str, split: str, index: int) -> np.random.Generator:
    """Return the random generator of one image, which depends only on these arguments."""
    key = hashlib.sha256(f"{seed}/{data_set}/{split}/{index}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))


def make_scene(rng: np.random.Generator, recipe: Recipe, label: int | None = None) -> Scene:
    """Draw one scene; `label` fixes the class of all its things, which are random otherwise."""
    canvas, stuff = _draw_background(rng, recipe, label)
    owner = np.zeros(stuff.shape, np.int16)
    angle = rng.uniform(0, 2 * np.pi)
    light = Light(np.array([np.cos(angle), np.sin(angle)]), rng.uniform(0, 0.45), rng.uniform(0, 0.6))
    drawn: list[tuple[int, tuple[Array, ...], int, bool]] = []
    members = [1] * int(rng.integers(recipe.num_things[0], recipe.num_things[1] + 1))
    if rng.random() < recipe.crowd_share:
        members.insert(0, int(rng.integers(7, 13)))  # a crowd is behind single things
    for number, count in enumerate(members, start=1):
        chosen = int(rng.integers(len(THINGS))) if label is None else label
        outlines = _place(rng, recipe, chosen, count)
        full = [_draw_thing(rng, canvas, outline, light, owner, number, chosen) for outline in outlines]
        drawn.append((chosen, outlines, int(np.logical_or.reduce(full).sum()), count > 1))
    for _ in range(rng.integers(recipe.max_bars + 1)):
        full_bar = _draw_thing(rng, canvas, _place_bar(rng, recipe.size), light, owner, 0)
        stuff[full_bar] = 0
    things = tuple(
        Thing(label_, outlines_, owner == number, area, crowd)
        for number, (label_, outlines_, area, crowd) in enumerate(drawn, start=1)
    )
    return Scene(_expose(rng, canvas), stuff, things)


def _build_ring(radius: float = 1.0, points: int = 40, start: float = 0.0, turn: float = 2 * np.pi) -> Array:
    angles = start + turn * np.arange(points + 1) / points
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _build_star() -> Array:
    return _build_ring(points=10)[:-1] * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]


def _build_crescent() -> Array:
    """Return the unit disc minus a disc of the same size, shifted by 0.6."""
    meet = np.arccos(0.3)
    inner = _build_ring(points=24, start=np.pi - meet, turn=2 * meet) + [0.6, 0.0]
    return np.concatenate([_build_ring(points=30, start=meet, turn=2 * np.pi - 2 * meet), inner[::-1]])


def _build_heart() -> Array:
    t = 2 * np.pi * np.arange(40) / 40
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -2.5 - y], axis=1) / 16


def _build_cross() -> Array:
    half_width, half_length = 0.33, 0.95
    quarter = np.array([[half_width, -half_length], [half_width, -half_width], [half_length, -half_width]])
    turn = np.array([[0, 1], [-1, 0]])  # each quarter is the one before, rotated by 90 degrees
    return np.concatenate([quarter, quarter @ turn, quarter @ turn @ turn, quarter @ turn @ turn @ turn])


OUTLINES: dict[str, Array] = {
    "arrow": np.array([[-1, -0.28], [0.1, -0.28], [0.1, -0.8], [1, 0], [0.1, 0.8], [0.1, 0.28], [-1, 0.28]]),
    "crescent": _build_crescent(),
    "cross": _build_cross(),
    "disc": _build_ring(0.9),
    "heart": _build_heart(),
    "hexagon": _build_ring(points=6)[:-1],
    "ring": np.concatenate(
        [_build_ring(), _build_ring(0.55)[::-1]]
    ),  # there and back along a slit of zero width
    "square": _build_ring(points=4)[:-1],
    "star": _build_star(),
    "triangle": _build_ring(points=3)[:-1],
}


def _pose(rng: np.random.Generator, label: int, radius: float, turn: float, centre: Array) -> Array:
    """Return the outline of a class, stretched, rotated and moved, float (P, 2)."""
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    angle = rng.uniform(-turn, turn)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outline: Array = (OUTLINES[THINGS[label]] * [stretch, 1 / stretch]) @ rotation.T * radius + centre
    return outline


def _place(rng: np.random.Generator, recipe: Recipe, label: int, count: int) -> tuple[Array, ...]:
    """Return the outline of one thing, or of `count` small ones in a crowd around a point."""
    low, high = np.log(recipe.radius)
    radius = recipe.size * np.exp(rng.uniform(low, high))
    if count == 1:
        margin = min(0.8 * radius, recipe.size / 2)
        return (_pose(rng, label, radius, recipe.turn, rng.uniform(margin, recipe.size - margin, 2)),)
    middle, small = rng.uniform(0.3, 0.7, 2) * recipe.size, recipe.size * rng.uniform(0.045, 0.075)
    centres = middle + rng.normal(0, 2.2 * small, (count, 2))
    return tuple(_pose(rng, label, small * rng.uniform(0.8, 1.2), recipe.turn, centre) for centre in centres)


def _place_bar(rng: np.random.Generator, size: int) -> Array:
    """Return the outline of a pole across the image, with a width of 4 to 10 % of its side."""
    angle, width = rng.uniform(0, np.pi), size * rng.uniform(0.02, 0.05)
    along = np.array([np.cos(angle), np.sin(angle)]) * 2 * size
    across = np.array([-np.sin(angle), np.cos(angle)]) * width
    centre = rng.uniform(0.1, 0.9, 2) * size
    return centre + np.stack([along + across, along - across, -along - across, -along + across])


def _draw_thing(
    rng: np.random.Generator,
    canvas: Array,
    outline: Array,
    light: Light,
    owner: Array,
    number: int,
    label: int | None = None,
) -> Array:
    """Draw a thing and its shadow onto `canvas`, set `owner` to `number`, return its mask, bool (H, W)."""
    size = len(canvas)
    reach = min(max(2.0, 0.2 * float(np.ptp(outline, axis=0).min())), 0.06 * size)  # of the shadow, in pixels
    x0, y0 = np.clip(np.floor(outline.min(axis=0) - 2 * reach), 0, size - 1).astype(int)
    x1, y1 = np.clip(np.ceil(outline.max(axis=0) + 2 * reach), 1, size).astype(int)
    window = (slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1)))
    alpha = _rasterise(outline - [x0, y0], canvas[window].shape[:2])
    where = np.zeros((size, size), bool)
    where[window] = alpha > 0.5
    if not where.any():
        return where
    shade = _rasterise(outline - [x0, y0] - light.direction * reach, alpha.shape, blur=reach / 3)
    ground = canvas[window] * (1 - light.shadow * shade)[..., None]
    paint = _paint(rng, outline - [x0, y0], alpha.shape, light, canvas[where].mean(axis=0), label)
    canvas[window] = ground + (paint - ground) * alpha[..., None]
    owner[where] = number
    return where


def _rasterise(outline: Array, shape: tuple[int, ...], blur: float = 0.0) -> Array:
    """Return the fraction of each pixel inside the polygon, float32 (h, w); blurred, it is a soft shadow."""
    scale = 1 if blur else SUPERSAMPLING
    image = Image.new("L", (shape[1] * scale, shape[0] * scale))
    ImageDraw.Draw(image).polygon([(x * scale, y * scale) for x, y in outline.tolist()], fill=255)
    image = image.filter(ImageFilter.BoxBlur(blur)) if blur else image.reduce(scale)
    return np.asarray(image, np.float32) / 255


def _paint(
    rng: np.random.Generator,
    outline: Array,
    shape: tuple[int, ...],
    light: Light,
    avoid: Array,
    label: int | None,
) -> Array:
    """Return the surface of a thing: two colours in a pattern, shaded by the light; float32 (h, w, 3)."""
    centre, radius = outline.mean(axis=0), max(np.ptp(outline, axis=0).max() / 2, 1.0)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    x, y = (x - np.float32(centre[0])) / np.float32(radius), (y - np.float32(centre[1])) / np.float32(radius)
    base = _sample_colour(rng, avoid)
    second = np.clip(base + rng.uniform(0.25, 0.55) * rng.choice([-1, 1]) * rng.uniform(0.5, 1, 3), 0, 1)
    shaded = 1 + np.float32(light.shading) * (
        x * np.float32(light.direction[0]) + y * np.float32(light.direction[1])
    )
    paint = base + _draw_pattern(rng, x, y, label)[..., None] * (second - base)
    surface: Array = np.clip(paint * shaded[..., None], 0, 1).astype(np.float32)
    return surface


def _draw_pattern(rng: np.random.Generator, x: Array, y: Array, label: int | None) -> Array:
    """Return a surface pattern over coordinates in units of the thing's radius, float (h, w) in [0, 1].

    Most things of a class have its typical pattern, fine or coarse: as with fur and feathers, texture
    indicates the class.
    """
    kind, fine = int(rng.integers(NUM_PATTERNS)), bool(rng.random() < 0.5)
    if label is not None and rng.random() < TYPICAL_PATTERN:
        kind, fine = label % NUM_PATTERNS, label >= NUM_PATTERNS
    angle, frequency = rng.uniform(0, np.pi), np.float32(rng.uniform(14, 20) if fine else rng.uniform(5, 8))
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = frequency * (c * x + s * y), frequency * (c * y - s * x)
    if kind == 0:  # plain
        return np.zeros_like(x)
    if kind == 1:  # stripes
        return np.clip(0.5 + 2 * np.sin(u), 0, 1)
    if kind == 2:  # checks
        return np.clip(0.5 + 3 * np.sin(u) * np.sin(v), 0, 1)
    if kind == 3:  # dots
        dots: Array = np.clip(3 * (np.cos(u) + np.cos(v)) - 2, 0, 1)
        return dots
    return _sample_noise(rng, x.shape, cell=rng.uniform(1.5, 2.5) if fine else rng.uniform(3.5, 5))


def _sample_colour(rng: np.random.Generator, avoid: Array | None = None) -> Array:
    """Return a random colour; that of a thing is brighter than `avoid`, the mean colour of its ground.

    Hue and saturation are independent of the class. The fixed sign of the contrast lets a small model learn
    shapes in minutes.
    """
    if avoid is None:
        return rng.uniform(0.02, 0.6, 3).astype(np.float32)
    colours = rng.uniform(0.2, 1.0, (8, 3)).astype(np.float32)
    gain = (colours - avoid) @ LUMA
    is_bright = gain > 0.3
    colour: Array = colours[np.argmax(is_bright) if is_bright.any() else np.argmax(gain)]
    return colour


def _sample_noise(rng: np.random.Generator, shape: tuple[int, ...], cell: float, flat: float = 1.0) -> Array:
    """Return smooth noise, float32 (h, w) in [0, 1], in cells `cell` pixels high and `flat` times as wide."""
    height, width = shape[0], shape[1]
    grid = rng.random((int(height / cell) + 2, int(width / (cell * flat)) + 2), dtype=np.float32)
    image = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
    noise: Array = np.clip(np.asarray(image), 0, 1)
    return noise


def _draw_background(rng: np.random.Generator, recipe: Recipe, label: int | None) -> tuple[Array, Array]:
    """Return up to `max_grounds` grounds, float32 (H, W, 3), and their stuff labels, uint8 (H, W)."""
    size = recipe.size
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    kinds = rng.permutation(len(STUFF))[: rng.integers(1, recipe.max_grounds + 1)]
    if label is not None and rng.random() < TYPICAL_GROUND:
        kinds[0] = label % len(STUFF)  # the typical ground of this class
    angle, wave = rng.uniform(-0.6, 0.6), rng.uniform(0, 0.12)
    height = y * np.cos(angle) + x * np.sin(angle) + wave * np.sin(x * rng.uniform(3, 12) + rng.uniform(0, 6))
    borders = np.sort(rng.uniform(0.2, 0.85, len(kinds) - 1))
    region = np.digitize(height, borders)
    canvas = np.empty((size, size, 3), np.float32)
    for place, kind in enumerate(kinds):
        inside = region == place
        canvas[inside] = _draw_ground(rng, int(kind), x, y, recipe.ground_colour)[inside]
    stuff = (kinds + 1).astype(np.uint8)[region]
    for border in borders:  # a thin seam of void, as annotators leave it
        stuff[np.abs(height - border) < 1.2 / size] = 0
    return canvas, stuff


def _draw_ground(rng: np.random.Generator, kind: int, x: Array, y: Array, typical: float) -> Array:
    """Return one stuff class, float32 (H, W, 3): its texture shows the class, its colour may indicate it."""
    size = len(x)
    first, second = _sample_colour(rng), _sample_colour(rng)
    if rng.random() < typical:
        first = np.clip(GROUND_COLOURS[STUFF[kind]] + rng.normal(0, 0.06, 3), 0.02, 0.7).astype(np.float32)
    second = np.clip(first + (second - first) * rng.uniform(0.2, 0.5), 0, 1).astype(np.float32)
    if STUFF[kind] == "sky":
        mix = 0.8 * y + 0.2 * _sample_noise(rng, x.shape, size / 3, 2.0)
    elif STUFF[kind] == "gravel":
        mix = 0.75 * _sample_noise(rng, x.shape, 1.5) + 0.25 * _sample_noise(rng, x.shape, size / 6)
    elif STUFF[kind] == "furrows":
        angle, frequency = rng.uniform(0, np.pi), rng.uniform(35, 80)
        bend = 0.05 * _sample_noise(rng, x.shape, size / 3)
        mix = 0.5 + 0.5 * np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle) + bend))
    elif STUFF[kind] == "water":
        mix = 0.7 * _sample_noise(rng, x.shape, size / 36, 6.0) + 0.3 * y
    else:
        mix = np.clip(0.5 + 5 * (_sample_noise(rng, x.shape, size / rng.uniform(8, 14)) - 0.5), 0, 1)
    ground: Array = first + mix.astype(np.float32)[..., None] * (second - first)
    return ground


def _expose(rng: np.random.Generator, canvas: Array) -> Array:
    """Apply a camera to the scene: illumination, white balance, contrast, noise and blur; uint8 (H, W, 3)."""
    size = len(canvas)
    slope, angle = rng.uniform(0, 0.4), rng.uniform(0, 2 * np.pi)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    field = 1 + np.float32(slope) * (
        line[None, :] * np.float32(np.cos(angle)) + line[:, None] * np.float32(np.sin(angle))
    )
    gain = (rng.uniform(0.6, 1.15) * rng.uniform(0.9, 1.1, 3)).astype(np.float32)
    image = (canvas * field[..., None] * gain - 0.5) * np.float32(rng.uniform(0.6, 1.2)) + 0.5
    sigma = rng.uniform(-0.03, 0.04)
    if sigma > 0:
        image = image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(sigma)
    pixels: Array = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    blur = rng.uniform(-1, 1) * size / 100
    if blur <= 0.2:
        return pixels
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur)))
