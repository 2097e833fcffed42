"""Paints the style images of samples/styles from nothing but code and a seed.

Run `python samples/paint.py [NAME…] [--out DIR]`. Pictures are painted at twice their size and reduced.

Shape legend: H, W the canvas in pixels; colours are float RGB in [0, 1]; lengths and coordinates are in units of the
canvas height, y downwards, so x runs from 0 to W / H. Heights (relief) are in arbitrary units.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.interpolate import CubicSpline
from scipy.spatial import cKDTree

Array = NDArray[np.float32]

CANVAS = (1440, 1920)
"""Height and width that are painted, in pixels."""
REDUCE = 2
"""Supersampling: the saved picture is smaller than its canvas by this factor."""
MAX_BYTES = 350_000


# ---------------------------------------------------------------------------------------------------------- materials


def grid(shape: tuple[int, int] = CANVAS) -> tuple[Array, Array]:
    """Return the coordinates x and y of each pixel, each HW."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return x / shape[0], y / shape[0]


def noise(
    rng: np.random.Generator,
    period: float | tuple[float, float],
    octaves: int = 4,
    shape: tuple[int, int] = CANVAS,
) -> Array:
    """Return fractal noise, HW, mean 0 and deviation 1; `period` is the largest feature (across, down)."""
    across, down = period if isinstance(period, tuple) else (period, period)
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        cells = (int(2**octave / down) + 3, int(2**octave * shape[1] / shape[0] / across) + 3)
        lattice = rng.standard_normal(cells).astype(np.float32)
        smooth = Image.fromarray(lattice).resize(shape[::-1], Image.Resampling.BICUBIC)
        total += np.asarray(smooth) * 0.55**octave
    return (total - total.mean()) / total.std()


def rgb(code: str) -> Array:
    """Return the colour that six hexadecimal digits name."""
    return np.frombuffer(bytes.fromhex(code), np.uint8).astype(np.float32) / 255


def ramp(position: Array, codes: str) -> Array:
    """Return colours, …×3, along evenly spaced pigments (`"1b2a49 f3e9d2"`) at positions in [0, 1]."""
    pigments = np.stack([rgb(code) for code in codes.split()])
    scaled = np.clip(position, 0, 1) * (len(pigments) - 1)
    low = np.minimum(scaled.astype(int), len(pigments) - 2)
    return pigments[low] + (pigments[low + 1] - pigments[low]) * (scaled - low)[..., None]


def step(value: Array, edge: float, width: float) -> Array:
    """Return a smooth rise from 0 to 1 that is `width` wide and centred on `edge`."""
    t = np.clip((value - edge) / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def mix(below: Array, above: Array, cover: Array | float) -> Array:
    """Return `above` laid over `below`, both HW3 or one colour, with coverage HW."""
    cover = np.asarray(cover, np.float32)[..., None]
    return below * (1 - cover) + above * cover


def light(height: Array, strength: float, *, azimuth: float = -2.2) -> tuple[Array, Array]:
    """Return the diffuse light (1 on the flat) and the gloss (0 on the flat) of a relief, each HW."""
    dy, dx = np.gradient(height * strength)
    tilt = (dx * np.cos(azimuth) + dy * np.sin(azimuth)) / np.sqrt(1 + dx * dx + dy * dy)
    return 1 - np.clip(tilt, -0.6, 0.6), np.clip(-tilt - 0.35, 0, 1) ** 2


# ------------------------------------------------------------------------------------------------------------ strokes


def paint_strokes(
    canvas: Array,
    relief: Array,
    plan: Array,
    flow: Array,
    *,
    rng: np.random.Generator,
    size: tuple[float, float],
    cover: float,
    jitter: float,
    fidelity: float,
    where: Array | None = None,
) -> None:
    """Paint one layer of brush strokes on `canvas`, HW3, and `relief`, HW, in place.

    Strokes of `size` (length, width) follow the unit vectors `flow`, 2HW (y, x), in the colours of `plan`, HW3; they
    stop where the plan's colour leaves their own by `fidelity`. Together they would `cover` the canvas that many times,
    but they start only by the chance `where`, HW.
    """
    height, width = relief.shape
    length_px, width_px = size[0] * height, size[1] * height
    starts = rng.random((int(cover * height * width / (length_px * width_px)), 2)) * (height, width)
    if where is not None:
        starts = starts[rng.random(len(starts)) < where[tuple(starts.astype(int).T)]]
    for some in np.array_split(starts, max(1, int(len(starts) * length_px * width_px / 2e6))):
        path, live = trace(some, plan, flow, steps=int(length_px * 1.3), fidelity=fidelity, rng=rng)
        lay_bristles(canvas, relief, plan, path, live, width_px=width_px, jitter=jitter, rng=rng)


def trace(
    starts: Array, plan: Array, flow: Array, *, steps: int, fidelity: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Follow the flow, or go against it, from N starts.

    Returns the paths, N×steps×2 (y, x), and where they are painted, N×steps bool.
    """
    at = starts.astype(np.float32)
    own = plan[tuple(at.astype(int).T)]
    path = np.empty((len(at), steps, 2), np.float32)
    live = np.empty((len(at), steps), bool)
    alive = np.ones(len(at), bool)
    reach = steps * rng.uniform(0.35, 1, len(at))
    sense = rng.choice([-1, 1], (len(at), 1)) / 1.3
    for i in range(steps):
        y, x = np.clip(at.astype(int), 0, np.array(flow.shape[1:]) - 1).T
        alive &= (np.abs(plan[y, x] - own).sum(-1) < fidelity) & (i < reach)
        path[:, i], live[:, i] = at, alive
        at = at + flow[:, y, x].T * sense
    return path, live


def lay_bristles(
    canvas: Array,
    relief: Array,
    plan: Array,
    path: Array,
    live: Array,
    *,
    width_px: float,
    jitter: float,
    rng: np.random.Generator,
) -> None:
    """Draw each bristle of N strokes along its path; later strokes cover earlier ones."""
    count, steps = live.shape
    across = np.linspace(-1, 1, max(4, int(width_px * 1.5)), dtype=np.float32)
    along = np.arange(steps) / np.maximum(live.sum(1, keepdims=True), 1)
    hair = ndimage.gaussian_filter1d(rng.standard_normal((count, len(across))), 0.8, axis=1) * 1.6
    swell = np.clip(np.minimum(along * 5, (1 - along) * 2.5), 0, 1) ** 0.5 * rng.uniform(0.55, 1.1, (count, 1))
    at = fan_out(path, swell[..., None] * across * width_px / 2)
    wet = along[..., None] < (rng.uniform(0.75, 1.5, (count, 1)) + 0.28 * hair)[:, None]
    drawn = (at >= 0).all(-1) & (at < relief.shape).all(-1) & wet & live[..., None]

    own = plan[tuple(np.clip(path[:, 0].astype(int), 0, np.array(relief.shape) - 1).T)]
    tint, second = (vary(rng, own, jitter) for _ in range(2))
    blend = np.clip(0.5 + across * rng.normal(0, 0.7, (count, 1)) + 0.25 * hair, 0, 1)
    streaks = tint[:, None] + (second - tint)[:, None] * blend[..., None] + 0.035 * hair[..., None]
    ridge = 0.55 * np.abs(across) ** 6 + 0.5 * (1 - across**2) + 0.3 * hair
    bead = 1 + 0.8 * np.exp(-(((along - 0.93) / 0.06) ** 2))

    # NumPy keeps the last value where an index repeats: the later stroke lies on top.
    y, x = at[drawn].T
    stroke, moment, bristle = np.nonzero(drawn)
    canvas[y, x] = np.clip(0.1 * canvas[y, x] + 0.9 * streaks[stroke, bristle], 0, 1)
    relief[y, x] = 0.45 * relief[y, x] + ridge[stroke, bristle] * bead[stroke, moment] * width_px**0.5


def fan_out(path: Array, offset: Array) -> Array:
    """Return the pixels, N×steps×bristles×2 (y, x), at `offset` pixels, N×steps×bristles, to the side of N paths."""
    tangent = np.gradient(path, axis=1)
    tangent /= np.linalg.norm(tangent, axis=-1, keepdims=True) + 1e-6
    normal = np.stack([tangent[..., 1], -tangent[..., 0]], -1)
    return (path[:, :, None] + normal[:, :, None] * offset[..., None]).round().astype(np.int32)


def vary(rng: np.random.Generator, colours: Array, amount: float) -> Array:
    """Return colours, N×3, made lighter or darker and warmer or cooler, each by chance."""
    lightness, warmth = amount * rng.standard_normal((2, len(colours), 1))
    return colours * (1 + lightness) + 0.35 * amount * lightness + 0.3 * warmth * np.array([1, 0.15, -0.8])


def dusk_sky(rng: np.random.Generator, x: Array, y: Array, sun: tuple[float, float]) -> tuple[Array, Array]:
    """Return the colours, HW3, and the stream function, HW, of a swirling sky around a low sun."""
    to_sun = np.hypot(x - sun[0], y - sun[1])
    stream = 0.045 * noise(rng, 0.7, 2) + 0.5 * (y + 0.3 * x)
    for cx, cy, size, turn in [(1.06, 0.2, 0.15, 1.1), (0.13, 0.33, 0.11, -0.9), (0.66, 0.06, 0.08, -0.8)]:
        stream += turn * size * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * size**2))
    stream = mix(stream[..., None], to_sun[..., None], step(-to_sun, -0.2, 0.2))[..., 0]
    bands = np.sin(stream * 42 + 0.9 * noise(rng, 0.25))
    sky = ramp(0.45 + 0.33 * bands + 0.13 * noise(rng, 0.12), "0a1233 131f66 1c4aa0 1b7fa6 4fb5b0 d3e6c0")
    warmth = 1.02 - to_sun / 0.55 + 0.2 * bands + 0.12 * noise(rng, 0.15)
    warmth = np.maximum(warmth, 1.04 - to_sun / 0.45)
    sky = mix(sky, ramp(warmth - 0.2, "6d2d63 c8452f ee7420 f9a825 fcd34d fff0b5"), step(warmth, 0.46, 0.12))
    return mix(sky, rgb("fff3c4"), step(-to_sun, -0.085, 0.01)), stream


def dusk_sea(rng: np.random.Generator, x: Array, y: Array, sun: tuple[float, float], horizon: float) -> Array:
    """Return the colours, HW3, of water that breaks up the light of the sun and of the harbour's lanterns."""
    near = y - horizon
    ripple = 0.5 + 0.5 * np.sin(22 * np.log(near.clip(0) + 0.12) + 1.6 * noise(rng, (0.4, 0.05), 3))
    sea = ramp(0.68 * ripple + 0.08 + 0.14 * noise(rng, (0.3, 0.06)), "060d26 0b2450 0d4c74 16838f 63c0ae")
    for cx, reach, pigments in [(sun[0], 0.055, "fff0b8 fbc540 f08a24 c1402c"), (1.13, 0.012, "fcd34d ee7420 a03330")]:
        path = np.exp(-(((x - cx) / (reach + 0.35 * near.clip(0) * reach / 0.055)) ** 2)) * 1.3 - 0.55 * ripple
        sea = mix(sea, ramp(near * 2.6 + 0.25 * ripple, pigments), step(path, 0.3, 0.15))
    return sea


def boat(x: Array, y: Array, foot: tuple[float, float], size: float) -> list[tuple[Array, str]]:
    """Return the shapes of a sailing boat, each HW bool with its pigment, far to near."""
    u, v = (x - foot[0]) / size, (foot[1] - y) / size
    main_sail = (u > 0.03) & (v > 0.12) & (u < 0.52 * (1.02 - v) + 0.08 * np.sin(3 * v))
    jib = (u < -0.02) & (v > 0.16) & (-u < 0.42 * (0.85 - v))
    hull = (v > -0.06) & (v < 0.12 + 0.12 * u * u) & (np.abs(u) < 0.5 + 0.9 * v)
    mast = (np.abs(u) < 0.022) & (v > 0) & (v < 1.12)
    glint = (np.abs(u - 0.12 * np.sin(26 * v)) < 0.2 + 0.25 * v) & (v < -0.1) & (v > -0.75)
    stripe = hull & (v > 0.05 + 0.12 * u * u)
    return [
        (glint, "c8452f"),
        (main_sail, "b8321f"),
        (jib, "fbe3a6"),
        (mast, "120b1f"),
        (hull, "35122b"),
        (stripe, "f0a03c"),
    ]


def harbour_plan(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Return the colours, HW3, the flow, 2HW (y, x), and the need of detail, HW, of an imagined harbour at dusk."""
    x, y = grid()
    sun, horizon = (0.45, 0.5), 0.63
    plan, stream = dusk_sky(rng, x, y, sun)
    plan = np.where((y > horizon)[..., None], dusk_sea(rng, x, y, sun, horizon), plan)
    stream = np.where(y > horizon, y + 0.012 * np.sin(x * 10 + y * 30) + 0.006 * noise(rng, (0.5, 0.2), 2), stream)

    crest = horizon - 0.17 * step(x, 1.12, 0.5) - 0.02 * noise(rng, 0.3, 3)
    cape = (y > crest) & (y < horizon + 0.004) & (x > 0.83)
    plan[cape] = ramp(
        0.5 + 0.25 * np.sin((y - crest) * 130 + x * 25) + 0.2 * noise(rng, 0.05), "120a24 2b1a4f 53306b b04a3e"
    )[cape]
    stream = np.where(cape, y - crest, stream)
    detail = np.hypot(x - sun[0], y - sun[1]) < 0.05
    for u, v in [(1.13, 0.6), (1.19, 0.575), (1.24, 0.605), (1.05, 0.615), (1.28, 0.56)]:
        lantern = np.hypot(x - u, y - v) < 0.011
        plan[lantern] = rgb("ffd75e")
        detail |= lantern
    for foot, size in [((0.74, 0.735), 0.24), ((0.2, 0.665), 0.1), ((0.97, 0.66), 0.07)]:
        for shape, pigment in boat(x, y, foot, size):
            plan[shape] = rgb(pigment)
            detail |= shape
            if pigment in ("b8321f", "fbe3a6"):
                stream = np.where(shape, x + 0.45 * y, stream)
    dy, dx = np.gradient(ndimage.gaussian_filter(stream, 2))
    flow = np.stack([-dx, dy])
    flow /= np.linalg.norm(flow, axis=0) + 1e-9
    return plan.astype(np.float32), flow.astype(np.float32), ndimage.gaussian_filter(detail * np.float32(1), 4)


def strokes(rng: np.random.Generator) -> Array:
    """Paint a harbour at dusk in oils: long curved strokes, coarse ones under fine ones."""
    plan, flow, detail = harbour_plan(rng)
    canvas = mix(plan, rgb("8f3d1c"), 0.8)
    relief = 0.6 * noise(rng, 0.006, 1)
    patches = step(noise(rng, 0.25, 2), 0.2, 1.2)
    for length, width, cover, jitter, fidelity, where in [
        (0.26, 0.036, 6.0, 0.16, 1.0, None),
        (0.18, 0.022, 3.2, 0.18, 0.55, None),
        (0.12, 0.012, 2.2, 0.2, 0.4, patches),
        (0.07, 0.007, 1.5, 0.24, 0.35, patches**2),
        (0.04, 0.007, 5.0, 0.16, 0.2, detail),
    ]:
        brush = {"size": (length, width), "cover": cover, "jitter": jitter, "fidelity": fidelity, "where": where}
        paint_strokes(canvas, relief, plan, flow, rng=rng, **brush)
    diffuse, gloss = light(ndimage.gaussian_filter(relief, 0.9), 0.45)
    return canvas * diffuse[..., None] + 0.5 * gloss[..., None]


# -------------------------------------------------------------------------------------------------------------- glass


def cells(rng: np.random.Generator, count: int, squeeze: tuple[Array, ...]) -> Array:
    """Return the labels, HW int, of relaxed Voronoi cells in the coordinates `squeeze`, each HW."""
    space = np.stack([axis.ravel() for axis in squeeze], -1)
    sites = space[rng.integers(0, len(space), count)]
    sample = space[rng.integers(0, len(space), 40_000)]
    for _ in range(6):
        owner = cKDTree(sites).query(sample)[1]
        filled = np.bincount(owner, minlength=count)
        means = (
            np.stack([np.bincount(owner, sample[:, k], count) for k in range(space.shape[1])], -1)
            / np.maximum(filled, 1)[:, None]
        )
        sites = np.where(filled[:, None] > 0, means, sites)
    return cKDTree(sites).query(space, workers=1)[1].reshape(squeeze[0].shape)


def borders(labels: Array) -> Array:
    """Return where a pixel's right or lower neighbour has another label, HW bool."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edge[:-1] |= labels[1:] != labels[:-1]
    return edge


def window_plan(rng: np.random.Generator) -> tuple[Array, Array, list[str]]:
    """Return the regions and the panes of a window, each HW int, and the pigments of each region."""
    x, y = grid()
    wobble = 0.02 * noise(rng, 0.5, 2)
    bloom = np.hypot(x - 0.86, y - 0.4) + wobble * 0.6
    turn = np.arctan2(y - 0.4, x - 0.86)
    petal = bloom / (1 + 0.16 * np.cos(9 * turn + 5 * bloom))
    region = np.digitize(petal, [0.055, 0.13, 0.25, 0.33])
    river = y + 0.16 * np.sin(4.2 * x + 0.6) + 0.05 * np.sin(9 * x) + wobble * 2
    region = np.where((region == 4) & (river > 0.62), 5 + np.digitize(river, [0.7, 0.76, 0.88]), region)
    branch = x - 0.2 - 0.12 * np.sin(5.5 * y + 0.4) - wobble
    region = np.where((np.abs(branch) < 0.02 + 0.02 * y) & (region != 6), 9, region)
    leaf = np.min(
        [
            np.hypot((x - u) * np.cos(a) + (y - v) * np.sin(a), 2.3 * ((y - v) * np.cos(a) - (x - u) * np.sin(a)))
            for u, v, a in [
                (0.1, 0.16, 0.6),
                (0.34, 0.1, 2.4),
                (0.42, 0.33, 0.5),
                (0.1, 0.42, 2.7),
                (0.26, 0.5, 1.0),
                (0.37, 0.62, 2.3),
            ]
        ],
        axis=0,
    )
    region = np.where((leaf < 0.1) & (region == 4), 10, region)

    panes = np.zeros_like(region)
    squeezes = {
        **{k: (0.09 * (k + 1) * np.cos(turn), 0.09 * (k + 1) * np.sin(turn), 0.8 * petal) for k in (0, 1, 2, 3)},
        4: (0.5 * x + 0.6 * np.cos(turn) * bloom, 0.5 * y + 0.6 * np.sin(turn) * bloom),
        **dict.fromkeys((5, 6, 7, 8), (0.7 * x, 1.6 * river)),
        9: (0.3 * x, y),
        10: (x, y),
    }
    counts = {0: 60, 1: 120, 2: 170, 3: 160, 4: 330, 5: 200, 6: 360, 7: 220, 8: 170, 9: 40, 10: 400}
    for k, squeeze in squeezes.items():
        panes[region == k] = (k * 1000 + cells(rng, counts[k], squeeze))[region == k]
    pigments = [
        "f6c945 fff3b0",
        "e0531f f59a23",
        "b5121b e8402a f07c2a",
        "7a1f6b c22f68",
        "0f3a8c 1f6fc4 5db7dd 2a50a8 8fd3e0",
        "0d6b5c 2ca089 0f8a9d",
        "f2d58a f7efc8 e9b44c",
        "1a7f8e 45b5aa 145a9c",
        "14306e 27217a 4a2d8f",
        "5b2a17 8a4a1e",
        "3e8c2f 86b62f c9cf45",
    ]
    return region, panes, pigments


def glass(rng: np.random.Generator) -> Array:
    """Paint a stained-glass window: a flower over a river, panes of streaky glass between dark leads."""
    x, y = grid()
    region, panes, pigments = window_plan(rng)
    _, pane = np.unique(panes, return_inverse=True)
    pane = pane.reshape(panes.shape)
    count = pane.max() + 1
    area = np.bincount(pane.ravel(), minlength=count)
    first = np.bincount(pane.ravel(), region.ravel(), count) / area
    tint, second = (
        np.stack([ramp(rng.random(1), pigments[int(k)])[0] for k in first]) * rng.uniform(0.7, 1.15, (count, 1))
        for _ in range(2)
    )
    cx, cy = (np.bincount(pane.ravel(), v.ravel(), count) / area for v in (x, y))
    heading, radius = rng.uniform(0, 2 * np.pi, count), np.sqrt(area / CANVAS[0] ** 2)
    across = ((x - cx[pane]) * np.cos(heading)[pane] + (y - cy[pane]) * np.sin(heading)[pane]) / radius[pane]

    inner, outer = (ndimage.distance_transform_edt(~borders(v)) / CANVAS[0] for v in (pane, region))
    flow = x * np.cos(heading)[pane] + y * np.sin(heading)[pane] + 0.03 * noise(rng, 0.2, 2)
    streaks = np.sin(45 * flow + 0.5 * noise(rng, 0.05)) * 0.45 + np.sin(190 * flow + 0.8 * noise(rng, 0.05)) * 0.4
    hammered = noise(rng, 0.011, 2) + 2.5 * step(noise(rng, 0.009, 1), 2.6, 0.5)
    colour = mix(tint[pane], second[pane], np.clip(0.3 + 0.45 * streaks + 0.35 * across, 0, 1))
    glow = (
        0.95
        + 0.28 * across
        + 0.2 * streaks
        + 0.1 * noise(rng, 0.03)
        + 0.07 * noise(rng, 0.007, 2)
        + 0.35 * step(inner, 0.012, 0.024)
    )
    colour = colour * glow[..., None] + 0.12 * step(across + 0.3 * streaks, 0.35, 0.9)[..., None]
    colour = np.clip(colour, 0, 1) ** np.where(tint[pane] > 0.6, 0.85, 1.15)
    diffuse, gloss = light(hammered, 0.9)
    colour = colour * (0.55 + 0.45 * diffuse)[..., None] + 0.6 * gloss[..., None]
    colour *= (0.5 + 0.5 * step(inner + 0.004 * hammered, 0.006, 0.014))[..., None]

    swell = 1 + 0.22 * noise(rng, 0.08, 3)
    lead = np.maximum(0.0029 * swell - inner, 0.006 * swell - outer)
    bead = np.sqrt(np.clip(lead / 0.006, 0, 1)) + 0.03 * noise(rng, 0.01, 3)
    shade, shine = light(ndimage.gaussian_filter(bead, 0.7), 9.0)
    metal = ramp(0.3 * shade + 0.1 * noise(rng, 0.05), "0a090c 1e1d24 3d3d47 6d6a70") + 0.35 * shine[..., None]
    halo = ndimage.gaussian_filter(np.clip(colour - 0.45, 0, 1), (14, 14, 0))
    return mix(colour, metal, step(lead, 0, 0.0012)) + 0.35 * halo


# -------------------------------------------------------------------------------------------------------------- waves


def swirl(x: Array, y: Array, curls: list[tuple[float, float, float, float]]) -> tuple[Array, Array]:
    """Return the coordinates x and y wound up around curls (x, y, radius, turn in radians)."""
    for cx, cy, radius, turn in curls:
        u, v = x - cx, y - cy
        angle = turn * np.exp(-(u * u + v * v) / radius**2)
        x, y = cx + u * np.cos(angle) - v * np.sin(angle), cy + u * np.sin(angle) + v * np.cos(angle)
    return x, y


def carve(rng: np.random.Generator, phase: Array, tone: Array) -> Array:
    """Return the ink, HW in [0, 1], of lines along whole numbers of `phase` that swell, taper and break with `tone`."""
    saw = np.abs((phase + 0.12 * noise(rng, 0.15, 3)) % 1 - 0.5) * 2
    swelling = tone + 0.22 * noise(rng, (0.2, 0.06), 2) + 0.1 * noise(rng, 0.015, 2)
    slope = np.hypot(*np.gradient(phase)) * 2 + 1e-4
    return np.clip((swelling - saw) / slope * 0.8 + 0.5, 0, 1) * step(swelling, 0.1, 0.1)


def wave(rng: np.random.Generator, base: float, height: float, length: float, shift: float) -> tuple[Array, Array]:
    """Return how deep each pixel lies under a breaking wave's crest and where along the unbroken wave, each HW."""
    x, y = grid()
    peaks = shift + length * np.arange(-1, 2 + int(1.4 / length))
    tall = height * rng.uniform(0.75, 1.25, len(peaks))
    curls = [
        (px + 0.1 * length, base - 0.72 * h, 0.62 * h + 0.02, 4.2 * rng.uniform(0.85, 1.15))
        for px, h in zip(peaks, tall, strict=True)
    ]
    u, v = swirl(x, y + 0.006 * noise(rng, 0.2, 3), curls)
    crest = sum(h * np.exp(-(((u - px) / (0.3 * length)) ** 2)) for px, h in zip(peaks, tall, strict=True))
    return v - base + crest + 0.1 * height * np.sin(2 * np.pi * (u - shift) / length * 2.3 + 1), u


def waves(rng: np.random.Generator) -> Array:
    """Print breaking waves under a vermilion sun from three carved blocks on cream paper."""
    x, y = grid()
    grain = noise(rng, (1.2, 0.012), 3)
    fibre = noise(rng, (0.02, 0.004), 2) + noise(rng, 0.25, 4)
    paper = ramp(0.5 + 0.16 * fibre, "d8c49a efe0bd f8efd6")
    fade = 0.55 + 0.12 * grain

    disc = step(0.17 - np.hypot(x - 0.92, y - 0.29), 0, 0.003)
    drift = y + 0.05 * np.sin(5 * x + 9 * y) + 0.02 * noise(rng, 0.5, 2)
    drift = drift - 0.09 * np.exp(-((np.hypot(x - 0.92, y - 0.29) / 0.24) ** 2))
    rays = carve(rng, 46 * y + 0.8 * np.sin(9 * x), 1.5 * (y - 0.29) + 0.12)
    clouds = carve(rng, 62 * np.sqrt((drift + 0.14).clip(0.01)), 0.6 - 1.25 * y + 0.16 * noise(rng, (0.6, 0.16), 2))
    flat = mix(paper, ramp(y * 2.2 + 0.08 * grain, "b9402b d9793f e9b476 f0dfb8"), (0.9 - 1.5 * y).clip(0, 1))
    flat = mix(
        flat,
        ramp(0.5 + 0.2 * grain - (y - 0.29), "8f1f16 c9301c e4502c"),
        disc * (0.92 + 0.06 * grain) * (1 - 0.85 * rays),
    )
    key = 0.85 * clouds * (1 - disc)

    for base, height, length, shift, rows, pigments in [
        (0.47, 0.05, 0.27, 0.1, 90, "f3e6c6 a9bfae 6d9aa3 4e7f95"),
        (0.56, 0.11, 0.45, 0.33, 62, "f6ead0 7fa8a6 2f6f8e 1d5580"),
        (0.7, 0.25, 0.85, 0.22, 44, "f8eed6 5f97a3 1f5688 163a70 123063"),
        (0.84, 0.17, 0.62, 0.74, 36, "f8eed6 e07a3c d0452a a82a20 6d1d2c"),
        (0.98, 0.2, 0.75, 0.36, 30, "f8eed6 4a8596 1b4a80 131f52 0f1840"),
    ]:
        depth, u = wave(rng, base, height, length, shift)
        fingers = 0.012 * np.abs(np.sin(u * 60 + 3 * noise(rng, 0.1, 2))) + 0.006 * noise(rng, 0.02, 2)
        foam = depth - 0.16 * height - fingers
        body = ramp(np.clip(foam, 0, 1) * 4.5 + 0.03 * grain + 0.05 * noise(rng, 0.1) + 0.16, pigments)
        water = step(foam, 0, 0.003)
        layer = mix(paper, body, water * (0.93 + 0.05 * grain))
        strata = rows * (depth + 0.04 * np.sin(u * 9))
        tone = 0.2 + 0.3 * np.sin(depth * 22 + 3 * u) + (0.6 * depth).clip(0, 0.2)
        hatch = carve(rng, strata, tone)
        cut = carve(rng, strata + 0.5, 0.16 - 0.42 * np.sin(depth * 22 + 3 * u + 0.5)) * water
        layer = mix(layer, paper, 0.75 * cut)
        outline = step(-np.abs(depth - 0.002), -0.003 - 0.0016 * fibre.clip(-1, 2), 0.002)
        rim = step(-np.abs(foam), -0.0017, 0.0015) * 0.8
        veins = carve(rng, u * 80 + 60 * foam, 0.1 - 0.9 * foam) * (1 - water)
        inside = step(depth, 0, 0.002)
        flat = mix(flat, layer, inside)
        key = key * (1 - inside) + np.maximum.reduce([hatch * water, rim, 0.9 * veins]) * inside
        spray = step(noise(rng, 0.011, 1) + 0.7 * noise(rng, 0.15, 1), 2.6 - 28 * depth.clip(-1, 0), 0.12) * (depth < 0)
        flat, key = mix(flat, rgb("f8eed6"), spray), np.maximum(key * (1 - spray), outline)
    ink = ramp(0.5 + 0.12 * grain, "0d1236 161d4a 232b5c")
    worn = np.clip(0.97 - 0.22 * step(fibre + noise(rng, 0.006, 2), 1.6, 1.2) + 0.05 * grain, 0, 1)
    printed = mix(flat, ink, ndimage.shift(key, (4, -3), order=0, mode="nearest") * worn)
    diffuse, _ = light(fibre + 0.6 * noise(rng, 0.004, 1) - 1.2 * ndimage.gaussian_filter(key, 1.5), 0.1)
    return printed * (0.4 + 0.6 * diffuse)[..., None] * (1 + 0.04 * fade * noise(rng, 0.5, 2))[..., None]


# ------------------------------------------------------------------------------------------------------------- mosaic


def body(x: Array, y: Array, spine: Array, width: float) -> tuple[Array, Array, Array]:
    """Return a fish's body along a `spine` (points x, y from nose to tail), each HW.

    Its distance (negative inside), the place along it in [0, 1], and the place across it, 0 to 1 from spine to side.
    """
    distance, nearest = cKDTree(spine).query(np.stack([x.ravel(), y.ravel()], -1))
    along = (nearest / (len(spine) - 1)).reshape(x.shape).astype(np.float32)
    distance = distance.reshape(x.shape).astype(np.float32)
    half = width * (1 - (1 - np.clip(along / 0.36, 0, 1)) ** 2.2) ** 0.6 * (1 - 0.87 * step(along, 0.66, 0.75))
    return distance - half, along, np.clip(distance / (half + 1e-6), 0, 1)


def fins(x: Array, y: Array, spine: Array, width: float) -> tuple[Array, Array]:
    """Return a fish's five fins, each HW: the distance (negative inside) and the place along the nearest fin."""
    distance, along = np.full(x.shape, 9, np.float32), np.zeros(x.shape, np.float32)
    for t, turn, length, breadth in [
        (0.3, 0.95, 2.4, 0.5),
        (0.3, -0.95, 2.4, 0.5),
        (0.62, 0.6, 1.3, 0.28),
        (0.62, -0.6, 1.3, 0.28),
        (0.96, 0.42, 3.1, 0.52),
        (0.96, -0.42, 3.1, 0.52),
        (0.96, 0, 2.0, 0.35),
    ]:
        k = int(t * (len(spine) - 2))
        heading = np.arctan2(*(spine[k + 1] - spine[k])[::-1]) + turn
        u = ((x - spine[k, 0]) * np.cos(heading) + (y - spine[k, 1]) * np.sin(heading)) / (length * width)
        v = (y - spine[k, 1]) * np.cos(heading) - (x - spine[k, 0]) * np.sin(heading)
        v = v - np.sign(turn) * 0.5 * width * u**2
        fin = np.abs(v) - breadth * width * np.sin(np.pi * np.clip(u, 0, 0.999) ** 1.5) ** 0.8
        fin += length * width * np.maximum(0, np.maximum(-u, u - 1))
        distance, along = np.minimum(distance, fin), np.where(fin < distance, u, along)
    return distance, along


def curve(points: list[tuple[float, float]]) -> Array:
    """Return 400 points of the smooth curve through `points`."""
    knots = np.array(points)
    t = np.linspace(0, len(knots) - 1, 400)
    return CubicSpline(np.arange(len(knots)), knots)(t).astype(np.float32)


def pond(rng: np.random.Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Return the colours, HW3, of rippled water with lily pads, and the field whose contours its tiles follow, HW."""
    drops = [(0.19, 0.17, 0.115), (1.17, 0.83, 0.15), (0.72, 1.12, 0), (0.98, -0.12, 0), (0.06, 0.98, 0.13)]
    field = np.minimum.reduce([np.hypot(x - u, y - v) for u, v, _ in drops]) + 0.014 * noise(rng, 0.6, 2)
    tone = 0.47 + 0.34 * np.sin(field * 66) + 0.15 * noise(rng, 0.2) - 0.2 * np.cos(field * 14)
    plan = ramp(tone, "0a1a48 113c86 1475a4 24a1a6 7ccdbb e6e6b8")
    for u, v, radius in drops:
        away, turn = np.hypot(x - u, y - v) - radius, np.arctan2(y - v, x - u)
        notch = np.abs(turn - 2.4 + 2 * (u < 0.5)) < 0.28
        leaf = ramp(
            0.5 + 0.3 * np.cos(11 * turn) - away * 4 - 0.4 + 0.1 * noise(rng, 0.1), "184a2c 2f7d32 7fb135 c8d65a"
        )
        plan = mix(plan, rgb("0a1233"), step(-away, -0.018, 0.004) * (radius > 0))
        plan = mix(plan, leaf, step(-away, 0, 0.004) * ~notch)
    return plan, field


def pond_plan(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Return the colours, HW3, the field whose contours the tiles follow, HW, and the tile size, HW, of two koi."""
    x, y = grid()
    plan, field = pond(rng, x, y)
    size = np.full(x.shape, 0.0185, np.float32)
    for points, width, pigments in [
        (
            [(1.08, 0.3), (0.95, 0.2), (0.75, 0.18), (0.55, 0.28), (0.42, 0.44)],
            0.105,
            "f7efd9 fbe0b0 ef7a22 d8391a 96190f",
        ),
        (
            [(0.34, 0.74), (0.5, 0.85), (0.72, 0.83), (0.9, 0.7), (1.02, 0.53)],
            0.095,
            "fdf3d5 f8cf52 f0a31e dd6418 a33a12",
        ),
    ]:
        spine = curve(points)
        trunk, along, across = body(x, y, spine, width)
        fin, out = fins(x, y, spine, width)
        away = np.minimum(trunk, fin)
        patches = step(noise(rng, 0.22, 2) + 0.5 - 0.8 * across**2, 0.1, 0.4)
        scales = np.sin(along * 90 - 5 * across)
        skin = ramp(0.1 + 0.62 * patches + 0.1 * scales - 0.1 * across, pigments)
        skin = mix(skin, rgb("fff6df"), step(-across, -0.12, 0.1) * step(along, 0.3, 0.1))
        skin = mix(skin, rgb("0a1233"), step(-np.hypot((along - 0.1) * 5, across - 0.62), -0.2, 0.05))
        veil = ramp(0.08 + 0.5 * out + 0.12 * np.sin(out * 30) + 0.1 * noise(rng, 0.1), pigments)
        for shape, colour in [
            (away - 0.017, rgb("0a1233")),
            (fin, veil),
            (trunk - 0.009, rgb("5a1a1c")),
            (trunk, skin),
        ]:
            plan = mix(plan, colour, step(-shape, 0, 0.002))
        reach = step(-away, -0.05, 0.05)
        field = field * (1 - reach) + np.where(trunk < 0, trunk, fin) * reach
        size = np.where(away < 0.02, 0.0125, size)
    return plan.astype(np.float32), field, size


def tessellate(
    rng: np.random.Generator, field: Array, size: Array, *, rounds: int
) -> tuple[Array, Array, Array, Array]:
    """Lay square tiles along the contours of `field`, by Lloyd's method in the tiles' own square metric.

    After A. Hausner, "Simulating decorative mosaics" (2001). Returns each pixel's tile, HW int; its place in that tile,
    HW2, within about ±1; how far the next tile is, HW, in tile sizes; and the tiles' centres, N×2 (x, y).
    """
    x, y = grid()
    dy, dx = np.gradient(ndimage.gaussian_filter(field, 4))
    heading = np.arctan2(dy, dx)
    share = (1 / size**2).ravel()
    total = share.mean() * CANVAS[1] / CANVAS[0]
    chosen = rng.choice(len(share), int(total * 0.97), replace=False, p=share / share.sum())
    pixels = np.stack([x.ravel(), y.ravel()], -1)
    sites = pixels[chosen]
    for final in [False] * rounds + [True]:
        some = pixels if final else pixels[rng.integers(0, len(pixels), 130_000)]
        row, column = np.clip((sites[:, ::-1] * CANVAS[0]).astype(int), 0, np.array(CANVAS) - 1).T
        turn, half = heading[row, column], size[row, column] / 2
        _, near = cKDTree(sites).query(some, k=5)
        offset = (some[:, None] - sites[near]) / half[near][..., None]
        cos, sin = np.cos(turn)[near], np.sin(turn)[near]
        place = np.stack([offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 1] * cos - offset[..., 0] * sin], -1)
        far = np.abs(place).max(-1)
        order = np.argsort(far, axis=1)[:, :2]
        owner = np.take_along_axis(near, order, 1)[:, 0]
        if not final:
            filled = np.maximum(np.bincount(owner, minlength=len(sites)), 1)
            moved = np.stack([np.bincount(owner, some[:, k], len(sites)) for k in (0, 1)], -1) / filled[:, None]
            sites = np.where((moved != 0).any(1, keepdims=True), moved, sites)
    best = np.take_along_axis(far, order, 1)
    inside = np.take_along_axis(place, order[:, :1, None], 1)[:, 0]
    return owner.reshape(CANVAS), inside.reshape(*CANVAS, 2), (best[:, 1] - best[:, 0]).reshape(CANVAS), sites


def mosaic(rng: np.random.Generator) -> Array:
    """Lay two koi in a pond from glass tiles that follow the contours of what they show."""
    plan, field, size = pond_plan(rng)
    tile, place, gap, sites = tessellate(rng, field, size, rounds=20)
    row, column = np.clip((sites[:, ::-1] * CANVAS[0]).astype(int), 0, np.array(CANVAS) - 1).T
    count = len(sites)
    tint = vary(rng, plan[row, column], 0.13)
    gold = rng.random((count, 1)) < 0.025
    tint = np.where(gold, rgb("e8b23a") * rng.uniform(0.8, 1.2, (count, 1)), tint)

    skew = rng.normal(0, 0.09, (count, 2, 2))
    bent = place + np.einsum("hwij,hwj->hwi", skew[tile], place)
    edge = np.minimum(1 - np.abs(bent).max(-1), gap * 0.5) + 0.05 * noise(rng, 0.008, 2)
    face = step(edge, 0.1, 0.1)
    tilt = (rng.normal(0, 0.11, (count, 2))[tile] * place).sum(-1)
    relief = np.sqrt(np.clip(edge * 3, 0, 1)) + 0.8 * tilt + 0.05 * noise(rng, 0.006, 2) + 0.04 * noise(rng, 0.02, 2)
    diffuse, gloss = light(ndimage.gaussian_filter(relief, 1), 4.5)
    vein = noise(rng, (0.012, 0.03), 3)
    glaze = tint[tile] * (1 + 0.09 * vein + 0.5 * tilt)[..., None] * (0.35 + 0.65 * diffuse)[..., None]
    glaze += 0.5 * gloss[..., None]
    grout = ramp(0.5 + 0.25 * noise(rng, 0.004, 2) + 0.2 * noise(rng, 0.2), "2a2320 4a3f38 6e6156")
    return mix(grout * (0.8 + 0.2 * diffuse[..., None]), glaze, face)


# --------------------------------------------------------------------------------------------------------------- main

PICTURES: dict[str, Callable[[np.random.Generator], Array]] = {
    "strokes": strokes,
    "glass": glass,
    "waves": waves,
    "mosaic": mosaic,
}


def save(picture: Array, path: Path) -> None:
    """Write a picture as JPEG at the highest quality up to 92 that keeps it under `MAX_BYTES`."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8)).reduce(REDUCE)
    for quality in range(92, 70, -1):
        image.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return


def main() -> None:
    """Paint the pictures that the command line names, or all."""
    parser = argparse.ArgumentParser(description="Paint the sample style images.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"pictures to paint: {', '.join(PICTURES)} (all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "styles", metavar="DIR")
    options = parser.parse_args()
    unknown = set(options.names) - set(PICTURES)
    if unknown:
        parser.error(f"no picture is called {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    for seed, (name, paint) in enumerate(PICTURES.items()):
        if not options.names or name in options.names:
            path = options.out / f"{name}.jpg"
            save(paint(np.random.default_rng(seed)), path)
            print(path)


if __name__ == "__main__":
    main()
