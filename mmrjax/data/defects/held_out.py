"""Defects to judge settings by, of other kinds than training blends into its pictures.

Every defect is drawn on the host, at the picture's own size, from a generator of its own. Sizes are
shares of the picture's shorter side, so that all views of the picture show the same defect. Small
kinds are the painters of `synthesise.HELD_OUT` and a piece of another picture with a sharp border.
Large kinds change the light or the texture of a region or of a strip. Every defect can be seen: a
change that the picture would swallow, such as a dark line on black, gets the other sign. Nothing is
Poisson-blended, since that is how the defects of training are made.
"""

import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.data.defects import kinds as painters
from mmrjax.data.defects import shapes, synthesise

SMALL = (*synthesise.HELD_OUT, "patch")
LARGE = ("shade", "band")
KINDS = (*SMALL, *LARGE)
CHANGED = 4.0  # grey levels from which a pixel belongs to the mask
SIDES = (4 / 224, 0.25)  # larger side of a small defect, as a share of the picture's shorter side
CONTRAST = (14.0, 80.0)  # mean change of a small defect, grey levels; from faint to plain
AREA = (0.1, 0.6)  # share of the picture that a large defect covers
PIECE = 0.02  # share of the picture below which a part of a large region is left out
LIGHT = (8.0, 48.0)  # grey levels by which a large region is lighter or darker
TEXTURE = (1.7, 3.5)  # factor by which its texture is stronger or weaker
GRAIN = 25.0  # grey levels from the mean around it up to which a pixel is texture, not an edge
SOFT = (0.002, 0.05)  # blur of its border, as a share of the picture's shorter side
WINDOW = 128  # px on which a painter draws
FIELD = 256  # px of the shorter side on which large regions are drawn

Rng = np.random.Generator


def draw(
    rng: Rng, image: np.ndarray, kind: str, donor: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one defect on a picture.

    Args:
      rng: generator of everything.
      image: uint8 [h, w, 3].
      kind: one of KINDS.
      donor: uint8 [h', w', 3], the picture that a "patch" is cut from.

    Returns:
      (the picture with the defect, uint8 [h, w, 3]; bool [h, w], where it is, never empty).
    """
    before = image.astype(np.float32)
    if kind in LARGE:
        cover = _cover(rng, before.shape[:2], kind)
        change = cover[..., None] * _resurfacing(rng, before, cover)
    elif kind == "patch":
        change = _patch(rng, before, donor.astype(np.float32))
    else:
        change = _painted(rng, before, kind)
    after = np.round(before + change).clip(0, 255)
    seen = np.abs(after - before).max(axis=-1)
    reach = _odd(min(seen.shape) / 64)
    if kind in LARGE:  # the mean around a pixel: single pixels of a changed texture stay
        mask = (cv2.blur(seen, (4 * reach + 1, 4 * reach + 1)) > CHANGED) & (cover > 0.1)
        pieces = _pieces(mask, PIECE)
        mask = pieces if pieces.any() else mask
    else:
        mask = (seen > CHANGED).astype(np.uint8)
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8)) > 0
    return after.astype(np.uint8), mask


def _painted(rng: Rng, before: np.ndarray, kind: str) -> np.ndarray:
    """The change by a painter of `kinds`, brought to a size and a contrast: [h, w, 1]."""
    numbers = rng.uniform(1e-7, 1, painters.UNIFORMS).astype(np.float32)
    normals = painters.NORMALS + painters.FIELDS * WINDOW**2
    pattern = np.asarray(_pattern(numbers, rng.standard_normal(normals, np.float32), kind))
    marked = np.abs(pattern) > 0.05 * np.abs(pattern).max()
    x, y, w, h = cv2.boundingRect(marked.astype(np.uint8))
    pattern, zoom = pattern[y : y + h, x : x + w], _side(rng, before.shape) / max(h, w)
    size = [max(1, round(n * zoom)) for n in (w, h)]
    pattern = cv2.resize(pattern, size, interpolation=cv2.INTER_AREA if zoom < 1 else 1)
    strength = np.abs(pattern)
    contrast = np.exp(rng.uniform(*np.log(CONTRAST)))
    pattern *= contrast / strength[strength > 0.2 * strength.max()].mean()
    top, left = (rng.integers(n - m + 1) for n, m in zip(before.shape, pattern.shape, strict=False))
    change = np.zeros((*before.shape[:2], 1), np.float32)
    change[top : top + size[1], left : left + size[0], 0] = pattern
    wanted = np.sign(pattern.sum())
    return change * wanted * _visible_sign(before, np.abs(change[..., 0]), contrast, wanted)


@functools.partial(jax.jit, static_argnames="kind")
def _pattern(uniforms: jax.Array, normals: jax.Array, kind: str) -> jax.Array:
    """How a painter changes a plain surface, as a share of its level: float32 [WINDOW, WINDOW]."""
    surface, everywhere = jnp.ones((WINDOW, WINDOW, 3)), jnp.ones((WINDOW, WINDOW), bool)
    place = painters.Place(surface, everywhere, *shapes.grid(WINDOW))
    painted = painters.PAINTERS[kind](shapes.Draws(uniforms, normals), place, None)
    return painted.source[..., 0] - 1


def _patch(rng: Rng, before: np.ndarray, donor: np.ndarray) -> np.ndarray:
    """The change by a turned rectangle of another picture with a sharp border: [h, w, 3]."""
    h, w = before.shape[:2]
    sides = _side(rng, before.shape) * np.array([1.0, rng.uniform(0.3, 1.0)])
    middle = rng.uniform(0.1, 0.9, 2) * (w, h)
    corners = cv2.boxPoints((middle.tolist(), sides.tolist(), rng.uniform(0, 180)))
    share = np.zeros((h, w), np.float32)
    cv2.fillPoly(share, [np.round(16 * corners).astype(np.int32)], 1.0, cv2.LINE_AA, 4)
    other = cv2.resize(np.rot90(donor, rng.integers(4)), (w, h), interpolation=cv2.INTER_AREA)
    other = np.roll(other, (rng.integers(h), rng.integers(w)), (0, 1))
    contrast, wanted = np.exp(rng.uniform(*np.log(CONTRAST))), rng.choice((-1, 1))
    change = share[..., None] * (other - before)
    if np.abs(change).sum() < CONTRAST[0] * 3 * share.sum():  # both pictures are alike there
        change += (share * contrast * _visible_sign(before, share, contrast, wanted))[..., None]
    return change


def _cover(rng: Rng, shape: tuple[int, int], kind: str) -> np.ndarray:
    """How much of a changed surface shows at each pixel, in [0, 1]: float32 [h, w]."""
    small = [round(n * FIELD / min(shape)) for n in shape]
    if kind == "shade":  # a slow random field is high there
        field = _noise(rng, small, FIELD * rng.uniform(0.18, 0.35))
        field += 0.12 * _noise(rng, small, FIELD / 40)
    else:  # near a wavy line along one of the picture's sides, a little askew
        angle = rng.choice((0, np.pi / 2)) + rng.normal(0, 0.15)
        y, x = (np.arange(n)[:, None] - rng.uniform(0, n) for n in small)
        field = -np.abs(y * np.cos(angle) + x.T * np.sin(angle))
        field += 0.04 * FIELD * _noise(rng, small, FIELD * rng.uniform(0.05, 0.2))
    share = np.exp(rng.uniform(*np.log(AREA)))
    region = _pieces(field > np.quantile(field, 1 - share), PIECE).astype(np.float32)
    soft = cv2.GaussianBlur(region, (0, 0), FIELD * np.exp(rng.uniform(*np.log(SOFT))))
    return cv2.resize(soft, shape[::-1], interpolation=cv2.INTER_LINEAR)


def _resurfacing(rng: Rng, before: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """The change by other light, a stronger or weaker texture, or both: float32 [h, w, 3]."""
    light = np.exp(rng.uniform(*np.log(LIGHT)))
    factor = np.exp(rng.uniform(*np.log(TEXTURE))) ** rng.choice((-1, 1))
    what, wanted = rng.choice(("light", "texture", "both")), rng.choice((-1, 1))
    reach = 2 * _odd(min(cover.shape) / 32) + 1
    texture = np.clip(before - cv2.blur(before, (reach, reach)), -GRAIN, GRAIN)
    change = (factor - 1) * texture * (what != "light")
    strength = (np.abs(change).mean(axis=-1) * cover).sum() / cover.sum()
    if what != "texture" or strength < 2 * CHANGED:  # a plain surface has no texture to change
        change += light * _visible_sign(before, cover, light, wanted)
    return change


def _visible_sign(before: np.ndarray, where: np.ndarray, contrast: float, wanted: float) -> float:
    """`wanted`, or the other sign if grey levels at `where`, weights [h, w], leave no room."""
    level = (before.mean(axis=-1) * where).sum() / where.sum()
    room = level if wanted < 0 else 255 - level
    return wanted if room >= min(contrast, 127.0) else -wanted


def _side(rng: Rng, shape: tuple[int, ...]) -> float:
    """The larger side of a small defect, px: large ones are more frequent."""
    low, high = (max(3.0, share * min(shape[:2])) for share in SIDES)
    return low * (high / low) ** np.sqrt(rng.uniform())


def _pieces(mask: np.ndarray, least: float) -> np.ndarray:
    """The connected parts of a mask that cover at least a share of the picture: bool [h, w]."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    is_kept = stats[:, cv2.CC_STAT_AREA] >= least * mask.size
    is_kept[0] = False  # outside the mask
    return is_kept[labels]


def _noise(rng: Rng, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Blurred noise of mean 0 and standard deviation 1: float32 [h, w]."""
    noise = cv2.GaussianBlur(rng.standard_normal(shape, np.float32), (0, 0), sigma)
    return (noise - noise.mean()) / noise.std()


def _odd(n: float) -> int:
    """An odd number of px near `n`, at least 3."""
    return max(3, 2 * int(n / 2) + 1)
