"""Episodes: a design photographed several times, with and without damage.

A design is a ground and a few shapes on it, each covered by one texture in two colours of its own.
A view draws the design again, a little turned and moved, under other light, with other blur and
noise, often with new samples of the same textures, and sometimes with damage. All that may change
between views of good parts changes; what has to be noticed is the damage, and every pixel of it is
known.
"""

import dataclasses

import cv2
import numpy as np

SIZE = 96  # side of a view in pixels
CANVAS = 128  # side of what a view is cut from
DAMAGE = ("spot", "pit", "crack", "scratch", "stain", "chip", "smear", "warp")
_SEEN = 12  # grey levels by which damage must change a pixel to count

Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class _Layer:
    sheet: np.ndarray
    table: np.ndarray  # uint8 [256, 3]: the colour of each grey level
    turn: np.ndarray  # [2, 2]: canvas to sheet
    middle: np.ndarray  # of the window in the sheet
    shape: np.ndarray | None  # uint8 [CANVAS, CANVAS] or None: everywhere
    redraw: bool  # every view shows another part of the sheet


def episode(rng: Rng, sheets: np.ndarray, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the views of one new design.

    Args:
      rng: generator of everything.
      sheets: uint8 [classes, side, side], from `textures.sheet`.
      views: how many.

    Returns:
      images uint8 [views, SIZE, SIZE, 3] and damage uint8 [views, SIZE, SIZE]: 0, or 1 + the index
      in DAMAGE.
    """
    design = _design(rng, sheets)
    spread = rng.uniform(0, 1) ** 2  # how much the views of this design differ
    images = np.empty((views, SIZE, SIZE, 3), np.uint8)
    damage = np.zeros((views, SIZE, SIZE), np.uint8)
    for i in range(views):
        part = _drawn(rng, design, spread)
        for _ in range(min(rng.poisson(1.3), 4)):
            kind = int(rng.integers(len(DAMAGE)))
            part, seen = damaged(rng, part, DAMAGE[kind], sheets)
            damage[i][seen] = kind + 1
        images[i] = _photographed(rng, part, spread)
    return images, damage


def _design(rng: Rng, sheets: np.ndarray) -> list[_Layer]:
    grey, muted = rng.random() < 0.35, rng.random() < 0.6
    layers = []
    for i in range(1 + min(rng.poisson(1.2), 5)):
        sheet = sheets[rng.integers(len(sheets))]
        angle, scale = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.5, 0.4))
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turn[:, 1] *= np.exp(rng.normal(0, 0.12)) * rng.choice((-1, 1))
        middle = rng.uniform(0.3, 0.7, 2) * sheet.shape[0]
        shape = None if i == 0 else _shape(rng)
        table = _colours(rng, grey, muted)
        layers.append(_Layer(sheet, table, turn, middle, shape, rng.random() < 0.6))
    return layers


def _colours(rng: Rng, grey: bool, muted: bool) -> np.ndarray:
    """A line between two colours, bent by a gamma: uint8 [256, 3]."""
    base = np.full(3, rng.random()) if grey else rng.random(3)
    contrast = rng.beta(1.3, 2.0) * rng.choice((-1, 1)) * (0.5 if muted else 1.0)
    tint = 0 if grey else rng.normal(0, 0.3 * abs(contrast), 3)
    steps = np.linspace(0, 1, 256)[:, None] ** np.exp(rng.normal(0, 0.3)) - 0.5
    return (255 * np.clip(base + steps * (contrast + tint), 0.02, 0.98)).astype(np.uint8)


def _shape(rng: Rng) -> np.ndarray:
    """Half plane, box, oval, polygon or blob: uint8 [CANVAS, CANVAS], 0 or 255."""
    kind = rng.integers(5)
    if kind == 4:
        small = rng.standard_normal((7, 7)).astype(np.float32)
        blob = cv2.resize(small, (CANVAS, CANVAS), interpolation=cv2.INTER_CUBIC)
        return np.where(blob > rng.uniform(-0.3, 0.8), 255, 0).astype(np.uint8)
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    centre = rng.uniform(0, CANVAS, 2)
    radius = np.exp(rng.uniform(np.log(8), np.log(60)))
    if kind == 0:
        start = rng.uniform(0, 2 * np.pi)
        far = 4 * CANVAS * np.array([np.cos(start), np.sin(start)])
        corners = centre + far + 2**0.5 * 4 * CANVAS * _ring(4, start + np.pi / 4)
    elif kind == 1:
        corners = centre + radius * _ring(4, rng.uniform(0, np.pi)) * rng.uniform(0.3, 1, 2)
    elif kind == 2:
        corners = centre + radius * _ring(40, 0.0) * rng.uniform(0.3, 1, 2)
    else:
        n = rng.integers(3, 10)
        corners = centre + radius * _ring(n, rng.uniform(0, np.pi)) * rng.uniform(0.4, 1, (n, 1))
    cv2.fillPoly(canvas, [np.round(corners).astype(np.int32)], 255)
    return canvas


def _ring(n: int, start: float) -> np.ndarray:
    angles = start + 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _drawn(rng: Rng, design: list[_Layer], spread: float) -> np.ndarray:
    """A view before light and damage: float32 [SIZE, SIZE, 3] in grey levels."""
    part = None
    for layer in design:
        cover = layer.table[_window(rng, layer)]
        if layer.shape is None:
            part = cover
        else:
            cv2.copyTo(cover, layer.shape, part)
    angle, scale = rng.normal(0, 0.12 * spread), np.exp(rng.normal(0, 0.05 * spread))
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offset = np.full(2, CANVAS / 2) - turn @ np.full(2, SIZE / 2) + rng.normal(0, 4 * spread, 2)
    return _warped(part, np.column_stack([turn, offset]), SIZE).astype(np.float32)


def _window(rng: Rng, layer: _Layer) -> np.ndarray:
    middle = layer.middle
    if layer.redraw:
        middle = rng.uniform(0.25, 0.75, 2) * layer.sheet.shape[0]
    offset = middle - layer.turn @ np.full(2, CANVAS / 2)
    return _warped(layer.sheet, np.column_stack([layer.turn, offset]), CANVAS)


def _warped(image: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (side, side), None, flags, cv2.BORDER_REFLECT)


def damaged(
    rng: Rng, part: np.ndarray, kind: str, sheets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Damages a view once.

    Args:
      rng: generator of everything.
      part: float32 [SIZE, SIZE, 3] in grey levels.
      kind: one of DAMAGE.
      sheets: uint8 [classes, side, side], from `textures.sheet`; a chip shows one of them.

    Returns:
      The new view, of the same form, and bool [SIZE, SIZE] where the damage can be seen.
    """
    centre = rng.uniform(4, SIZE - 4, 2)
    amount = rng.uniform(0.12, 0.75)
    if kind in ("stain", "smear", "warp"):
        soft = _blot(rng, centre, np.exp(rng.uniform(np.log(5), np.log(35))), soft=True)
    elif kind in ("chip", "pit"):
        soft = _blot(rng, centre, rng.uniform(1.2, 5 if kind == "pit" else 16), soft=False)
    else:
        soft = _spot(rng, centre) if kind == "spot" else _line(rng, centre, kind == "crack")
    mask = soft[..., None]
    if kind == "stain":
        factor = rng.choice((-1, 1)) * 0.6 * amount + rng.normal(0, 0.1, 3)
        after = part * (1 + mask * factor.astype(np.float32))
    elif kind == "smear":
        after = part + mask * (cv2.GaussianBlur(part, (0, 0), rng.uniform(1.5, 5)) - part)
    elif kind == "warp":
        after = _swirled(rng, part, soft)
    elif kind == "chip":
        table = _colours(rng, rng.random() < 0.5, muted=True)
        sheet = sheets[rng.integers(len(sheets))]
        x, y = rng.integers(0, sheet.shape[0] - SIZE, 2)
        cover = table[sheet[y : y + SIZE, x : x + SIZE]].astype(np.float32)
        light = np.clip(1 + 0.5 * _relief(rng, soft), 0.3, 1.7)[..., None]
        after = part + mask * (cover * light - part)
    elif kind == "pit":
        rim = np.maximum(cv2.GaussianBlur(soft, (0, 0), 1.2) - 0.8 * soft, 0)
        after = part * (1 - amount * mask)
        after += 255 * amount * (0.8 * rim + 0.3 * _relief(rng, soft))[..., None]
    elif rng.random() < 0.7:
        after = part * (1 - amount * mask)
    else:
        after = part + amount * mask * (255 - part)
    after = np.clip(after, 0, 255).astype(np.float32)
    return after, np.abs(after - part).max(-1) > _SEEN


def _swirled(rng: Rng, part: np.ndarray, soft: np.ndarray) -> np.ndarray:
    """Displaces the surface inside a soft region by a smooth random field."""
    field = cv2.resize(rng.standard_normal((5, 5, 2)).astype(np.float32), (SIZE, SIZE))
    field *= rng.uniform(3, 10) * soft[..., None]
    x, y = np.meshgrid(np.arange(SIZE, dtype=np.float32), np.arange(SIZE, dtype=np.float32))
    return cv2.remap(
        part, x + field[..., 0], y + field[..., 1], cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT
    )


def _spot(rng: Rng, centre: np.ndarray) -> np.ndarray:
    canvas = np.zeros((SIZE, SIZE), np.float32)
    axes = np.round(16 * np.exp(rng.uniform(np.log(0.8), np.log(4), 2))).astype(int)
    turn, middle = rng.uniform(0, 180), np.round(16 * centre).astype(int)
    cv2.ellipse(canvas, middle.tolist(), axes.tolist(), turn, 0, 360, 1.0, -1, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.0))


def _blot(rng: Rng, centre: np.ndarray, radius: float, soft: bool) -> np.ndarray:
    canvas = np.zeros((SIZE, SIZE), np.float32)
    n = 9 + int(radius)
    corners = radius * _ring(n, rng.uniform(0, 6)) * rng.uniform(0.5, 1, (n, 1))
    corners = centre + corners * rng.uniform(0.5, 1, 2)
    cv2.fillPoly(canvas, [np.round(16 * corners).astype(np.int32)], 1.0, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.1, 0.3) * radius if soft else 0.6)


def _line(rng: Rng, centre: np.ndarray, is_crack: bool) -> np.ndarray:
    """A scratch (smooth) or a crack (jagged, sometimes forked), 1 to 3 pixels wide."""
    canvas = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(1 + (is_crack and rng.random() < 0.4)):
        length = np.exp(rng.uniform(np.log(5), np.log(60)))
        step = rng.uniform(2, 6) if is_crack else length / 12
        n = max(2, int(length / step))
        turns = rng.normal(0, 0.5, n) if is_crack else np.cumsum(rng.normal(0, 0.03, n))
        angles = rng.uniform(0, 2 * np.pi) + turns
        steps = step * np.stack([np.cos(angles), np.sin(angles)], 1)
        path = centre + np.cumsum(steps, 0) - steps.sum(0) * rng.random()
        points = [np.round(16 * path).astype(np.int32)]
        cv2.polylines(canvas, points, False, 1.0, int(rng.integers(1, 3)), cv2.LINE_AA, 4)
    return np.minimum(1.5 * cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 0.8)), 1)


def _relief(rng: Rng, height: np.ndarray) -> np.ndarray:
    """Light and shade on the slopes of a shape, about -1 to 1."""
    angle = rng.uniform(0, 2 * np.pi)
    dy, dx = np.gradient(height)
    return (2 * (np.cos(angle) * dx + np.sin(angle) * dy)).astype(np.float32)


def _photographed(rng: Rng, part: np.ndarray, spread: float) -> np.ndarray:
    """Uneven light, exposure, tint, gamma, blur, noise: uint8 [SIZE, SIZE, 3]."""
    light = rng.standard_normal((3, 3)).astype(np.float32) * rng.uniform(0, 0.2) * spread
    light = cv2.resize(
        light + rng.normal(0, 0.3 * spread), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC
    )
    tint = 1 + rng.normal(0, 0.06 * spread, 3) * (rng.random() < 0.6)
    out = part * np.exp(light)[..., None] * tint.astype(np.float32)
    if rng.random() < 0.5:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.3, 0.5 + 0.6 * spread))
    out += rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32) * rng.uniform(0, 7)
    levels = np.linspace(0, 1, 256) ** np.exp(rng.normal(0, 0.15 * spread))
    return (255 * levels).astype(np.uint8)[np.clip(out, 0, 255).astype(np.uint8)]
