"""Damage to the airfoil: groove, fracture, ablation, breakdown.

Each defect changes the height field and the material of a surface, as the real thing would: a
groove is a trench with a burr, a fracture a missing piece with a rough broken face, an ablation a
patch of lost coating with heat tint and pits, a breakdown a torn and bent corner. Look and mask of
a defect follow from photographing the damaged surface (see `sample`).
"""

import cv2
import numpy as np

from data_builders.demo_parts import part

_STRAW, _BLUE = (1.03, 0.84, 0.60), (0.68, 0.70, 0.90)  # heat tint: factors on the reflectance
_BARE = ((0.40, 0.31, 0.25), (0.50, 0.47, 0.44), (1.20, 1.16, 1.08))  # scorched, eroded, polished
KINDS = ("groove", "fracture", "ablation", "breakdown")

_ROWS = np.arange(part.HEIGHT, dtype=np.float32)[:, None]


def damage(
    rng: np.random.Generator, blade: part.Blade, kind: str, extent: float
) -> tuple[part.Surface, np.ndarray]:
    """Damages a copy of a blade's surface.

    Args:
      rng: generator of place and shape.
      blade: the good part; it stays as it is.
      kind: one of `KINDS`.
      extent: longest side that the damage should have, in canvas pixels (roughly kept).

    Returns:
      The damaged surface, and bool [h, w]: the canvas points that differ from the good one.
    """
    surface = blade.surface.copy()
    _MAKERS[kind](rng, blade, surface, extent)
    np.maximum(surface.height, 0.0, out=surface.height)
    np.clip(surface.colour, 0.01, 1.0, out=surface.colour)
    np.clip(surface.matte, 0.0, 1.0, out=surface.matte)
    good = blade.surface
    changed = np.abs(surface.height - good.height) > 0.05
    changed |= np.abs(surface.colour - good.colour).max(-1) > 0.005
    changed |= np.abs(surface.matte - good.matte) > 0.02
    return surface, changed


def _groove(rng, blade: part.Blade, surface: part.Surface, extent: float) -> None:
    """A gouge across the surface, or a nick in from an edge."""
    is_nick = rng.random() < 0.4
    if is_nick:
        side = float(rng.random() < 0.5)
        angle = np.pi * side + rng.uniform(-0.7, 0.7)
        start = np.array(blade.point(rng.uniform(0.12, 0.9), side))
        start -= 2.0 * np.array([np.cos(angle), np.sin(angle)])
    else:
        middle = _free_point(rng, blade, extent)
        toward = np.array(blade.point(rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))) - middle
        angle = np.arctan2(toward[1], toward[0]) + rng.uniform(-0.9, 0.9)
        start = middle - min(0.5 * extent, 12.0) * np.array([np.cos(angle), np.sin(angle)])
    width = rng.uniform(1.0, 1.5) * (0.9 + extent / 200.0)
    trench = _scratch(rng, start, angle, extent, width)
    _press(surface, trench, depth=7.0 if is_nick else 2.6, dark=rng.uniform(0.35, 0.62))


def _free_point(rng, blade: part.Blade, extent: float) -> np.ndarray:
    """A point on the airfoil; for small damage one between the holes, to tell it from them."""
    for _ in range(60):
        x, y = blade.point(rng.uniform(0.1, 0.92), rng.uniform(0.08, 0.92))
        reach = int(extent / 2 + 3)
        box = blade.holes[int(y) - reach : int(y) + reach + 1, int(x) - reach : int(x) + reach + 1]
        if extent > 28 or not box.any():
            break
    return np.array([x, y])


def _scratch(rng, start, angle: float, length: float, width: float) -> np.ndarray:
    """A curved line that tapers at its end, as float32 [h, w] in [0, 1]."""
    steps = max(4, int(length / 3.0))
    t = np.linspace(0.0, 1.0, steps)
    wander = np.cumsum(rng.normal(0.0, 0.06, steps)) + rng.uniform(-0.5, 0.5) * t
    x = start[0] + np.cumsum(np.cos(angle + wander)) * length / steps
    y = start[1] + np.cumsum(np.sin(angle + wander)) * length / steps
    mark = np.zeros((part.HEIGHT, part.WIDTH), np.uint8)
    taper = np.sqrt(np.sin(np.pi * (0.12 + 0.88 * t))) * (1.0 - 0.4 * t)
    radius = width * taper * (1.0 + 0.2 * rng.standard_normal(steps).clip(-1, 1))
    for i in range(steps):
        for share in (0.0, 0.5):
            j = min(i + 1, steps - 1)
            px, py = x[i] + share * (x[j] - x[i]), y[i] + share * (y[j] - y[i])
            centre = (round(16 * px), round(16 * py))
            cv2.circle(mark, centre, max(round(16 * radius[i]), 8), 255, -1, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(mark, (0, 0), 0.6).astype(np.float32) / 255.0


def _press(surface: part.Surface, trench: np.ndarray, depth: float, dark: float) -> None:
    """Cuts a trench: lower, darker and rougher inside, a raised bright burr on both sides."""
    on_part = (surface.height > 2.0).astype(np.float32)
    inside = trench * on_part
    burr = np.clip(cv2.GaussianBlur(trench, (0, 0), 1.6) - 0.8 * trench, 0, 1) * on_part
    surface.height += 3.0 * burr - depth * inside
    surface.colour *= (1.0 - dark * inside + 0.25 * burr)[..., None]
    surface.matte += (0.75 - surface.matte) * inside


def _fracture(rng, blade: part.Blade, surface: part.Surface, extent: float) -> None:
    """A piece broken out of an edge."""
    centre, inward = _edge_place(rng, blade)
    across = rng.uniform(0.5, 0.85) * extent
    piece = _shard(rng, centre, inward, 0.5 * extent, across, jag=0.22)
    _break_off(rng, surface, piece, face=min(1.5 + extent / 22.0, 5.0))


def _edge_place(rng, blade: part.Blade) -> tuple[np.ndarray, float]:
    """A point on the rim of the airfoil and the direction that leads inwards, in radians."""
    side = rng.choice(3, p=(0.35, 0.4, 0.25))
    if side == 2:
        x = blade.point(1.0, rng.uniform(0.25, 0.75))[0]
        return np.array([x, float(blade.tip[int(x)])]), np.pi / 2
    span = rng.uniform(0.15, 0.88)
    return np.array(blade.point(span, float(side))), np.pi * float(side)


def _shard(rng, centre, inward: float, half: float, deep: float, jag: float) -> np.ndarray:
    """An irregular faceted patch, [h, w] in [0, 1]; `half` along the rim, `deep` inwards."""
    count = int(rng.integers(9, 13) + half / 5.0)
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(-0.2, 0.2, count)
    radius = 1.0 + jag * rng.standard_normal(count).clip(-1.6, 1.6)
    u, v = deep * radius * np.cos(angle), half * radius * np.sin(angle)
    cos, sin = np.cos(inward), np.sin(inward)
    x, y = centre[0] + cos * u - sin * v, centre[1] + sin * u + cos * v
    mark = np.zeros((part.HEIGHT, part.WIDTH), np.uint8)
    points = np.round(np.stack([x, y], -1) * 16).astype(np.int32)
    cv2.fillPoly(mark, [points], 255, cv2.LINE_AA, 4)
    patch = mark.astype(np.float32) / 255.0
    rough = part.noise(rng, 3, 3) * 0.9 + part.noise(rng, 9, 9) * 0.8
    distance = cv2.distanceTransform((patch > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
    distance -= cv2.distanceTransform((patch <= 0.5).astype(np.uint8), cv2.DIST_L2, 3)
    return np.clip(distance + rough * min(1.0, half / 14.0) + 0.5, 0.0, 1.0)


def _break_off(rng, surface: part.Surface, piece: np.ndarray, face: float) -> None:
    """Removes a piece and leaves a dark, grainy broken face of a given width along the break."""
    piece = piece * part.smoothstep(part.PLATFORM_Y - 4, part.PLATFORM_Y - 14, _ROWS)
    piece = np.maximum(piece, _loose(surface.height * (1.0 - piece), piece))
    near = cv2.GaussianBlur(piece, (0, 0), face * 0.55)
    broken = part.smoothstep(0.06, 0.32, near) * (surface.height > 2.0)
    grain = part.noise(rng, 2, 2)
    surface.height -= broken * (3.0 + 0.7 * grain)
    shade = 0.42 + 0.16 * grain
    surface.colour *= (1.0 + broken * (shade - 1.0))[..., None]
    surface.matte += (0.8 - surface.matte) * broken
    surface.tilt_x += 0.25 * broken * grain
    surface.tilt_y += 0.25 * broken * np.roll(grain, 5, axis=0)
    surface.height *= 1.0 - piece


def _loose(height: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """Slivers that the break leaves, and parts that no longer hang on the root; 0 or 1, [h, w]."""
    solid = (height > 1.5).astype(np.uint8)
    stout = cv2.morphologyEx(solid, cv2.MORPH_OPEN, cv2.getStructuringElement(2, (11, 11)))
    around = cv2.dilate((piece > 0.5).astype(np.uint8), np.ones((25, 25), np.uint8))
    kept = np.where(around > 0, stout, solid)
    _, labels = cv2.connectedComponents(kept, connectivity=4)
    held = labels == labels[int(part.PLATFORM_Y) + 16, int(part.CENTRE[0])]
    return ((solid > 0) & ~held).astype(np.float32)


def _ablation(rng, blade: part.Blade, surface: part.Surface, extent: float) -> None:
    """A patch burnt through the coating: bare, rough metal inside a halo of heat tint."""
    centre = _free_point(rng, blade, extent)
    away = _patch_distance(rng, centre, extent)
    ragged = away + 0.06 * part.noise(rng, 3, 3)
    on_airfoil = (surface.height > 4.0) & (_ROWS < part.PLATFORM_Y - 6)
    strength = float(rng.uniform(0.5, 1.0))
    bare = _BARE[rng.choice(3, p=(0.45, 0.35, 0.2))]
    factor = np.ones_like(surface.colour)
    for field, outer, inner, tone in (
        (away, 1.06, 0.84, _STRAW),
        (away, 0.90, 0.68, _BLUE),
        (ragged, 0.74, 0.60, bare),
    ):
        share = (part.smoothstep(outer, inner, field) * on_airfoil)[..., None]
        factor += share * (np.array(tone, np.float32) - factor)
    core = part.smoothstep(0.74, 0.60, ragged) * on_airfoil
    mottle = 0.6 * part.noise(rng, 6, 6) + 0.4 * part.noise(rng, 2, 2)
    pits = np.clip(part.noise(rng, 4, 4) - 1.3, 0, 1)
    surface.colour *= 1.0 + strength * (factor - 1.0)
    surface.colour *= (1.0 + strength * core * (0.10 * mottle - 0.45 * pits))[..., None]
    surface.matte += (0.85 - surface.matte) * core * (0.4 + 0.6 * strength)
    surface.height -= core * (0.7 + 0.15 * mottle + pits)


def _patch_distance(rng, centre, extent: float) -> np.ndarray:
    """Distance from a point, [h, w]; about 1 on the rim of an uneven oval of the given length."""
    y, x = np.ogrid[0 : part.HEIGHT, 0 : part.WIDTH]
    ratio, angle = rng.uniform(0.45, 0.9), rng.uniform(0, np.pi)
    dx, dy = (x - centre[0]).astype(np.float32), (y - centre[1]).astype(np.float32)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    u, v = cos * dx + sin * dy, (cos * dy - sin * dx) / ratio
    distance = np.sqrt(u * u + v * v) / (0.5 * extent)
    broad, narrow = max(4.0, 0.26 * extent), max(3.0, 0.11 * extent)
    return distance + 0.17 * part.noise(rng, broad, broad) + 0.06 * part.noise(rng, narrow, narrow)


def _breakdown(rng, blade: part.Blade, surface: part.Surface, extent: float) -> None:
    """A corner or edge torn off and bent by an impact, with cracks running inwards."""
    side = float(rng.random() < 0.65)
    is_corner = rng.random() < 0.6
    span = rng.uniform(0.93, 0.99) if is_corner else rng.uniform(0.3, 0.8)
    centre = np.array(blade.point(span, side))
    inward = np.pi * side + (rng.uniform(0.3, 0.8) * (1 - 2 * side) if is_corner else 0.0)
    _bend(rng, surface, centre, extent)
    half = extent * rng.uniform(0.30, 0.42)
    piece = _shard(rng, centre, inward, half, half * rng.uniform(0.7, 1.0), jag=0.26)
    for _ in range(rng.integers(1, 4)):
        angle = inward + rng.uniform(-0.9, 0.9)
        start = centre + 0.8 * half * np.array([np.cos(angle), np.sin(angle)])
        crack = _scratch(rng, start, angle, extent * rng.uniform(0.2, 0.45), 1.2)
        _press(surface, crack, depth=3.0, dark=0.7)
    _break_off(rng, surface, piece, face=4.0 + extent / 40.0)


def _bend(rng, surface: part.Surface, centre, extent: float) -> None:
    """Pushes the metal around a point down or up, with creases."""
    y, x = np.ogrid[0 : part.HEIGHT, 0 : part.WIDTH]
    dx, dy = (x - centre[0]).astype(np.float32), (y - centre[1]).astype(np.float32)
    near = part.smoothstep(0.62 * extent, 0.15 * extent, np.sqrt(dx * dx + dy * dy))
    crease = np.abs(part.noise(rng, 16, 16)) * 2.5 + np.abs(part.noise(rng, 7, 7)) * 0.8
    push = float(rng.choice((-1.0, 0.7))) * min(0.16 * extent, 14.0)
    on_part = surface.height > 2.0
    moved = np.maximum(surface.height + near * (push - crease), np.minimum(surface.height, 3.0))
    surface.height = np.where(on_part, moved, surface.height).astype(np.float32)
    surface.colour *= (1.0 - 0.12 * near * on_part)[..., None]


_MAKERS = {
    "groove": _groove,
    "fracture": _fracture,
    "ablation": _ablation,
    "breakdown": _breakdown,
}
