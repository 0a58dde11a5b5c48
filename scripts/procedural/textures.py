"""Grey textures drawn by formulas: the classes that the embedded teacher learns to tell apart.

A class is a family (below) with its parameters, both drawn from one seed; a sheet is a sample of
it. Families follow what formula-driven pretraining has used: iterated function systems (Kataoka et
al., FractalDB, arXiv 2101.08515), dead leaves and spectra (Baradad et al., arXiv 2106.05963), small
image programs (Baradad et al., arXiv 2211.16412), and surfaces as a workshop has them: brushed,
woven, granular, cellular, laid in rows.
"""

from collections.abc import Callable

import cv2
import numpy as np
from scipy import fft

SIZE = 256  # side of a sheet in pixels

Rng = np.random.Generator
Field = np.ndarray  # float32 [SIZE, SIZE], any range

_X, _Y = np.meshgrid(np.arange(SIZE, dtype=np.float32), np.arange(SIZE, dtype=np.float32))
_FX, _FY = np.meshgrid(fft.rfftfreq(SIZE), fft.fftfreq(SIZE))


def sheet(seed: int, label: int) -> np.ndarray:
    """Draws the sheet of one class: uint8 [SIZE, SIZE], using the whole grey range."""
    rng = np.random.default_rng([seed, label])
    field = FAMILIES[label % len(FAMILIES)](rng)
    if rng.random() < 0.3:
        field = _warped(rng, field)
    if rng.random() < 0.2:  # a second texture, as grain on the first or in its dark places
        other = _equalised(FAMILIES[rng.integers(len(FAMILIES))](rng))
        field = _equalised(field)
        share = rng.uniform(0.2, 0.5)
        mixed = (1 - share) * field + share * other
        field = mixed if rng.random() < 0.5 else np.where(field > share, field, share * other)
    return (255 * _equalised(field)).astype(np.uint8)


def _equalised(field: Field) -> Field:
    """Stretched to [0, 1] between its 1st and 99th percentile."""
    low, high = np.percentile(field, (1, 99))
    return np.clip((field - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def _filtered_noise(rng: Rng, gain: np.ndarray) -> Field:
    """White noise with the amplitudes `gain` [SIZE, SIZE / 2 + 1]; zero mean, unit deviation."""
    spectrum = fft.rfft2(rng.standard_normal((SIZE, SIZE), dtype=np.float32)) * gain
    spectrum[0, 0] = 0
    field = fft.irfft2(spectrum, (SIZE, SIZE)).astype(np.float32)
    return field / (field.std() + 1e-6)


def _turned_frequencies(rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    angle = rng.uniform(0, np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * _FX + sin * _FY, cos * _FY - sin * _FX


def _smooth(rng: Rng, scale: float) -> Field:
    return _filtered_noise(rng, np.exp(-0.5 * (np.hypot(_FX, _FY) * 2 * np.pi * scale) ** 2))


def _warped(rng: Rng, field: Field) -> Field:
    scale = float(np.exp(rng.uniform(np.log(6), np.log(40))))
    reach = scale * rng.uniform(0.2, 0.8)
    x, y = (_X + reach * _smooth(rng, scale), _Y + reach * _smooth(rng, scale))
    return cv2.remap(field.astype(np.float32), x, y, cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)


def power_noise(rng: Rng) -> Field:
    """1 / f^beta noise, stretched along one direction; sometimes folded into ridges or steps."""
    u, v = _turned_frequencies(rng)
    radius = np.hypot(u, v * np.exp(rng.uniform(-1.5, 1.5)))
    field = _filtered_noise(rng, np.maximum(radius, 1 / SIZE) ** -rng.uniform(0.4, 2.2))
    kind = rng.integers(4)
    if kind == 1:
        return -np.abs(field)
    if kind == 2:
        return np.tanh(rng.uniform(2, 8) * (field - rng.normal(0, 0.5)))
    return field


def band_noise(rng: Rng) -> Field:
    """Noise of one ring, or of one lobe, of frequencies (Gabor noise)."""
    frequency = np.exp(rng.uniform(np.log(0.02), np.log(0.25)))
    width = frequency * rng.uniform(0.08, 0.5)
    u, v = _turned_frequencies(rng)
    if rng.random() < 0.4:
        gain = np.exp(-(((np.hypot(u, v) - frequency) / width) ** 2))
    else:
        spread = frequency * rng.uniform(0.05, 0.6)
        gain = np.exp(-(((np.abs(u) - frequency) / width) ** 2) - (v / spread) ** 2)
    field = _filtered_noise(rng, gain)
    return np.tanh(3 * field) if rng.random() < 0.3 else field


def brushed(rng: Rng) -> Field:
    """Long thin streaks of one direction, with a few deeper scratches."""
    u, v = _turned_frequencies(rng)
    length, width = rng.uniform(20, 120), rng.uniform(0.4, 2.0)
    gain = np.exp(-0.5 * ((u * 2 * np.pi * length) ** 2 + (v * 2 * np.pi * width) ** 2))
    field = _filtered_noise(rng, gain)
    return field + rng.uniform(0, 2) * np.maximum(field - rng.uniform(1, 2.5), 0) * 3


def granular(rng: Rng) -> Field:
    """Grains: speckle of one size, thresholded softly, on a rough ground."""
    size = np.exp(rng.uniform(np.log(0.7), np.log(6)))
    field = _smooth(rng, size)
    edge = rng.uniform(-1.5, 1.5)
    grains = 1 / (1 + np.exp(-rng.uniform(3, 15) * (field - edge)))
    return grains + rng.uniform(0, 0.4) * _smooth(rng, rng.uniform(0.5, 2))


def waves(rng: Rng) -> Field:
    """A few plane waves of any wave form: stripes, checks, lattices, moire."""
    field = np.zeros((SIZE, SIZE), np.float32)
    start, count = rng.uniform(0, np.pi), rng.integers(1, 4)
    for i in range(count):
        angle = start + np.pi * i / count + rng.normal(0, 0.05)
        period = np.exp(rng.uniform(np.log(5), np.log(40)))
        phase = (np.cos(angle) * _X + np.sin(angle) * _Y) / period * 2 * np.pi + rng.uniform(0, 6)
        wave = np.sin(phase)
        sharp = rng.uniform(0, 6)
        wave = np.tanh(sharp * (wave - rng.uniform(-0.6, 0.6))) if sharp > 1.5 else wave
        field = np.maximum(field, wave) if rng.random() < 0.3 else field + wave
    return field


def _points(rng: Rng, spacing: float, jitter: float) -> np.ndarray:
    """A jittered square or hexagonal grid of points, float32 [n, 2] (x, y), turned."""
    n = int(2 * SIZE / spacing) + 2
    i, j = np.meshgrid(np.arange(n) - n // 2, np.arange(n) - n // 2)
    x = (i + (0.5 * (j % 2) if rng.random() < 0.5 else 0)).ravel() * spacing
    y = j.ravel() * spacing * rng.uniform(0.7, 1.2)
    angle = rng.uniform(0, np.pi)
    xy = np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], 1)
    return xy + SIZE / 2 + rng.normal(0, jitter * spacing, xy.shape)


def cellular(rng: Rng) -> Field:
    """Cells around points: distance to the point, borders, or one grey level per cell."""
    spacing = np.exp(rng.uniform(np.log(7), np.log(40)))
    seeds = np.full((SIZE, SIZE), 255, np.uint8)
    xy = np.round(_points(rng, spacing, rng.uniform(0, 0.5))).astype(int)
    xy = xy[((xy >= 0) & (xy < SIZE)).all(1)]
    seeds[xy[:, 1], xy[:, 0]] = 0
    distance, labels = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    levels = rng.random(labels.max() + 1).astype(np.float32)[labels]
    kind = rng.integers(4)
    if kind == 0:
        return np.minimum(distance, spacing)
    if kind == 1:
        return levels + rng.uniform(0, 0.3) * _smooth(rng, rng.uniform(0.6, 3))
    flat = labels.astype(np.float32)
    border = (cv2.dilate(flat, np.ones((3, 3))) != cv2.erode(flat, np.ones((3, 3)))) * 1.0
    border = cv2.GaussianBlur(border.astype(np.float32), (0, 0), rng.uniform(0.6, 2.0))
    return border * rng.uniform(0.5, 2) + (0.5 * levels if kind == 2 else -distance / spacing)


def dots(rng: Rng) -> Field:
    """Discs, rings or squares on a grid: holes, rivets, knurls, print."""
    spacing = np.exp(rng.uniform(np.log(8), np.log(36)))
    field = np.zeros((SIZE, SIZE), np.float32)
    radius = spacing * rng.uniform(0.12, 0.45)
    kind, jitter = rng.integers(3), rng.choice((0.0, 0.05, 0.3))
    for x, y in _points(rng, spacing, jitter):
        centre = (round(16 * x), round(16 * y))
        if kind < 2:
            thick = -1 if kind == 0 else max(1, round(radius / 3))
            cv2.circle(field, centre, round(16 * radius), 1.0, thick, cv2.LINE_AA, 4)
        else:
            corner = (round(16 * (x + radius)), round(16 * (y + radius)))
            cv2.rectangle(field, centre, corner, 1.0, -1, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(field, (0, 0), rng.uniform(0.4, spacing / 6))


def laid(rng: Rng) -> Field:
    """Bricks, tiles or planks with joints, each with a level of its own."""
    h, w = np.exp(rng.uniform(np.log(8), np.log(40), 2))
    angle = rng.uniform(0, np.pi)
    u = np.cos(angle) * _X + np.sin(angle) * _Y
    v = np.cos(angle) * _Y - np.sin(angle) * _X
    row = np.floor(v / h)
    u = u + row * w * rng.choice((0.0, 0.5, 1 / 3))
    column = np.floor(u / w)
    level = np.modf(np.abs(np.sin(row * 12.9898 + column * 78.233) * 43758.5453))[0]
    to_joint = np.minimum(
        np.minimum(u / w % 1, 1 - u / w % 1) * w, np.minimum(v / h % 1, 1 - v / h % 1) * h
    )
    joint = np.clip(to_joint / rng.uniform(0.8, 3), 0, 1)
    return joint * (1 + rng.uniform(0, 1) * level)


def woven(rng: Rng) -> Field:
    """Warp and weft that pass over each other: cloth, mesh, carbon fibre."""
    period, twill = rng.uniform(6, 24), rng.integers(1, 4)
    angle = rng.uniform(0, np.pi)
    u = (np.cos(angle) * _X + np.sin(angle) * _Y) / period
    v = (np.cos(angle) * _Y - np.sin(angle) * _X) / period
    over = (np.floor(u) + np.floor(v)) % (twill + 1) < 1
    warp, weft = np.abs(np.sin(np.pi * u)), np.abs(np.sin(np.pi * v))
    bend = rng.uniform(0.3, 1.0)
    return np.where(over, warp * (1 - bend * (1 - weft)), rng.uniform(0.5, 1) * weft)


def dead_leaves(rng: Rng) -> Field:
    """Overlapping discs, boxes or polygons with a power law of sizes."""
    field = np.full((SIZE, SIZE), 0.5, np.float32)
    kind, low = rng.integers(3), rng.uniform(2, 8)
    count = int(rng.uniform(300, 900))
    radii = np.minimum(low * rng.pareto(rng.uniform(1.5, 3), count) + low, 60)
    places = rng.uniform(-10, SIZE + 10, (count, 2))
    levels, turns = rng.random(count), rng.uniform(0, np.pi, count)
    for (x, y), r, level, turn in zip(places, radii, levels, turns, strict=True):
        if kind == 0:
            cv2.circle(
                field, (round(16 * x), round(16 * y)), round(16 * r), level, -1, cv2.LINE_AA, 4
            )
        else:
            sides = 4 if kind == 1 else 3 + int(level * 5)
            a = turn + 2 * np.pi * np.arange(sides) / sides
            corners = np.stack([x + r * np.cos(a), y + r * np.sin(a)], 1)
            cv2.fillPoly(field, [np.round(16 * corners).astype(np.int32)], level, cv2.LINE_AA, 4)
    return field


def fractal(rng: Rng) -> Field:
    """Density of an iterated function system of 2 to 5 contracting affine maps (chaos game)."""
    n = rng.integers(2, 6)
    maps = rng.uniform(-1, 1, (n, 2, 3))
    for i in range(n):  # singular values below one: the orbit stays
        u, s, vt = np.linalg.svd(maps[i, :, :2])
        maps[i, :, :2] = u @ np.diag(np.clip(s, 0.25, 0.85)) @ vt
    share = np.abs(np.linalg.det(maps[:, :, :2])) + 0.02
    points = rng.uniform(-1, 1, (4000, 2))
    kept = []
    for step in range(36):
        chosen = maps[rng.choice(n, len(points), p=share / share.sum())]
        points = np.einsum("nij,nj->ni", chosen[:, :, :2], points) + chosen[:, :, 2]
        if step >= 12:
            kept.append(points)
    xy = np.concatenate(kept)
    low, high = np.percentile(xy, (1, 99), axis=0)
    bins = ((xy - low) / np.maximum(high - low, 1e-6) * (SIZE - 1)).astype(int)
    bins = bins[((bins >= 0) & (bins < SIZE)).all(1)]
    density = np.zeros((SIZE, SIZE), np.float32)
    np.add.at(density, (bins[:, 1], bins[:, 0]), 1.0)
    return cv2.GaussianBlur(np.log1p(density), (0, 0), rng.uniform(0.5, 1.5))


def spots_and_mazes(rng: Rng) -> Field:
    """A Turing pattern: difference of Gaussians iterated through a squashing function."""
    field = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    scale = rng.uniform(1.2, 4.0)
    bias, stretch = rng.normal(0, 0.25), np.exp(rng.normal(0, 0.3))
    for _ in range(14):
        near = cv2.GaussianBlur(field, (0, 0), scale, None, scale * stretch)
        far = cv2.GaussianBlur(field, (0, 0), 1.6 * scale, None, 1.6 * scale * stretch)
        field = np.tanh(6 * (near - far) + bias * 0.3 + 0.4 * near)
    return field


def program(rng: Rng) -> Field:
    """A small random image program: sums, products and sines of coordinates and noise."""
    scale = np.exp(rng.uniform(np.log(8), np.log(50)))
    values = [
        _X / scale,
        _Y / scale,
        _smooth(rng, rng.uniform(2, 20)),
        np.hypot(_X - rng.uniform(0, SIZE), _Y - rng.uniform(0, SIZE)) / scale,
    ]
    for _ in range(rng.integers(4, 8)):
        a, b = (values[i] for i in rng.integers(len(values), size=2))
        kind, gain = rng.integers(5), rng.uniform(0.5, 3)
        if kind == 0:
            values.append(np.sin(gain * a + b))
        elif kind == 1:
            values.append(np.sin(a) * np.cos(gain * b))
        elif kind == 2:
            values.append(np.abs(np.sin(gain * a)) - np.tanh(b))
        elif kind == 3:
            values.append(np.maximum(np.sin(a), np.sin(gain * b)))
        else:
            values.append(np.mod(a * gain, 1.0) + 0.3 * np.sin(b))
    return np.asarray(values[-1] + 0.3 * values[-2], np.float32)


FAMILIES: tuple[Callable[[Rng], Field], ...] = (
    power_noise,
    band_noise,
    brushed,
    granular,
    waves,
    cellular,
    dots,
    laid,
    woven,
    dead_leaves,
    fractal,
    spots_and_mazes,
    program,
)
