"""The ground of the part: procedural bench tops, as a tile of linear RGB reflectance.

The training images have anti-static rubber mats (`MATS`); all other families appear only in the
domain `background`. Light and shadow are added by `render`.
"""

import functools

import cv2
import numpy as np

from data_builders.demo_parts import part

SIDE = 400  # tile pixels, two canvas pixels each; the middle lies under the camera

_MAT_COLOURS = {
    "black mat": (0.020, 0.021, 0.023),
    "grey mat": (0.095, 0.098, 0.102),
    "blue mat": (0.040, 0.070, 0.115),
}
MATS = tuple(_MAT_COLOURS)


def make_tile(rng: np.random.Generator, family: str) -> np.ndarray:
    """Tile of bench top, [SIDE, SIDE, 3] float32 linear reflectance.

    Args:
      rng: the generator of this table top.
      family: a key of `FAMILIES`.
    """
    tile = FAMILIES[family](rng)
    return np.clip(tile, 0.003, 0.95).astype(np.float32)


def _noise(rng: np.random.Generator, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise over the tile, [SIDE, SIDE], about unit variance."""
    return part.noise_tile(rng, SIDE, SIDE, cell_y, cell_x)


def _paint(base: tuple[float, float, float], shade: np.ndarray) -> np.ndarray:
    """A colour times a shade [SIDE, SIDE]."""
    return np.asarray(base, np.float32) * shade[..., None]


def _wear(rng: np.random.Generator, count: int) -> np.ndarray:
    """Faint scuffs, [SIDE, SIDE] in [0, 1]."""
    mark = np.zeros((SIDE, SIDE), np.uint8)
    for _ in range(count):
        start = rng.uniform(0, SIDE, 2)
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(15, 110)
        bend = rng.uniform(-0.5, 0.5)
        t = np.linspace(0.0, 1.0, 12)[:, None]
        line = start + length * t * np.hstack([np.cos(angle + bend * t), np.sin(angle + bend * t)])
        points = np.round(line * 16).astype(np.int32)
        cv2.polylines(mark, [points], False, int(rng.uniform(30, 110)), 1, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(mark, (0, 0), 0.5).astype(np.float32) / 255.0


def _mat(base: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Anti-static rubber mat: pebbled, matte, a little scuffed."""
    pebble = cv2.GaussianBlur(_noise(rng, 1, 1), (0, 0), 0.6) * 1.6
    shade = 1.0 + 0.13 * pebble + 0.06 * _noise(rng, 45, 45) + 0.03 * _noise(rng, 7, 7)
    return _paint(base, shade * rng.uniform(0.85, 1.15)) + 0.05 * _wear(rng, 12)[..., None]


def _wood(rng: np.random.Generator) -> np.ndarray:
    """Planks of a beech work bench."""
    axis = np.arange(SIDE, dtype=np.float32)
    warp = 13.0 * _noise(rng, 130, 30) + 1.0 * _noise(rng, 60, 4)
    rings = np.sin((axis + warp) * rng.uniform(0.40, 0.62))
    pores = np.clip(_noise(rng, 14, 1) - 1.1, 0, 2)
    shade = (
        1.0 + 0.10 * rings + 0.05 * _noise(rng, 25, 1) - 0.20 * pores + 0.08 * _noise(rng, 150, 20)
    )
    phase, width = rng.uniform(10, 90), rng.uniform(85, 115)
    seam = 1.0 - 0.75 * np.exp(-((((axis - phase) % width) / 1.0 - 2.0) ** 2))
    tile = _paint((0.40, 0.24, 0.12), shade * rng.uniform(0.75, 1.05) * seam)
    return _turned(tile, rng.uniform(-40, 40))


def _cutting(rng: np.random.Generator) -> np.ndarray:
    """Green cutting mat with a printed grid."""
    shade = 1.0 + 0.05 * _noise(rng, 1, 1) + 0.05 * _noise(rng, 40, 40)
    tile = _paint((0.025, 0.13, 0.085), shade)
    pitch = rng.uniform(24, 30)
    axis = np.arange(SIDE, dtype=np.float32) + rng.uniform(0, pitch)
    line = np.exp(-((axis % pitch - pitch / 2) ** 2) / 0.5)
    fine = np.exp(-((axis % (pitch / 5) - pitch / 10) ** 2) / 0.4) * 0.12
    both = np.maximum(line, fine)
    grid = np.maximum(both[None], both[:, None])
    tile += 0.22 * grid[..., None] * np.array([0.8, 1.0, 0.6], np.float32)
    return _turned(tile + 0.03 * _wear(rng, 20)[..., None], rng.uniform(-30, 30))


def _cloth(rng: np.random.Generator) -> np.ndarray:
    """Woven lint-free wipe, off-white, with soft folds."""
    axis = np.arange(SIDE, dtype=np.float32)
    thread = rng.uniform(1.7, 2.1)
    weave = np.sin(thread * (axis[None] + 1.0 * _noise(rng, 30, 30))) * np.sin(
        thread * axis[:, None]
    )
    folds = 0.10 * _noise(rng, 120, 60) + 0.05 * _noise(rng, 35, 22)
    shade = 1.0 + 0.12 * weave + folds + 0.03 * _noise(rng, 1, 1)
    return _turned(_paint((0.46, 0.45, 0.42), shade * rng.uniform(0.7, 1.0)), rng.uniform(-45, 45))


def _granite(rng: np.random.Generator) -> np.ndarray:
    """Speckled surface plate."""
    speck = 0.9 * _noise(rng, 1, 1) + 0.7 * _noise(rng, 2, 2)
    light = np.clip(speck - 0.9, 0, 2)[..., None] * np.array([0.14, 0.12, 0.11], np.float32)
    dark = np.clip(-speck - 0.8, 0, 1)
    return _paint((0.13, 0.095, 0.085), 1.0 - 0.7 * dark + 0.05 * _noise(rng, 30, 30)) + light


def _painted(rng: np.random.Generator) -> np.ndarray:
    """Painted sheet-steel tray: strong colour, fine orange peel, scratches to the primer."""
    base = ((0.36, 0.055, 0.035), (0.40, 0.25, 0.03), (0.30, 0.33, 0.34))[rng.integers(3)]
    shade = 1.0 + 0.04 * _noise(rng, 2, 2) + 0.06 * _noise(rng, 60, 60)
    wear = _wear(rng, 26)[..., None]
    return _paint(base, shade) * (1 - wear) + 0.35 * wear


def _turned(tile: np.ndarray, degrees: float) -> np.ndarray:
    """The tile turned about its centre, mirrored at the border."""
    matrix = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), degrees, 1.0)
    return cv2.warpAffine(tile, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT_101)


FAMILIES = {
    **{name: functools.partial(_mat, base) for name, base in _MAT_COLOURS.items()},
    "wood": _wood,
    "cutting": _cutting,
    "cloth": _cloth,
    "granite": _granite,
    "painted": _painted,
}
