"""Textures that stand for the inside of a foreign defect: of any folder, or drawn here.

Both are kept as uint8 in device memory. The drawn ones need no download: noise of many
roughnesses, waves, cells and dots in random colours.
"""

import pathlib

import cv2
import numpy as np

from mmrjax.data.defects import bank

MOST = 1000  # pictures of a folder that are kept: 151 MB at 224 x 224 px
DRAWN = 200


def make(folder: str, size_hw: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, dict]:
    """The textures of a folder or, without a folder, drawn ones.

    Args:
      folder: pictures at any depth, such as the Describable Textures Dataset; "": none.
      size_hw: (height, width) in px.
      seed: chooses among more than 1,000 pictures, or draws.

    Returns:
      (uint8 [n, h, w, 3] RGB, facts for results.json).

    Raises:
      ValueError: the folder holds no picture that can be read.
    """
    if not folder:
        return draw(DRAWN, size_hw, seed), {"textures": {"source": "procedural", "count": DRAWN}}
    textures, found = load(folder, size_hw, seed)
    facts = {"source": pathlib.Path(folder).name, "count": len(textures), "found": found}
    return textures, {"textures": facts}


def load(folder: str, size_hw: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, int]:
    """(up to 1,000 pictures of a folder, how many there are); arguments and errors as `make`.

    Pictures are squashed by bilinear interpolation without antialiasing, as in DRAEM's code.
    """
    root = pathlib.Path(folder).expanduser()
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in bank.PICTURES)
    order = np.random.default_rng(seed).permutation(len(paths))
    textures = []
    for i in order:
        image = cv2.imread(str(paths[i]), cv2.IMREAD_COLOR_RGB)
        if image is not None:
            textures.append(cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_LINEAR))
        if len(textures) == MOST:
            break
    if not textures:
        raise ValueError(
            f"--config.data.textures={folder}: no picture in this folder can be read; give a "
            "folder of textures, or leave the field empty for drawn ones"
        )
    return np.stack(textures), len(paths)


def draw(count: int, size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Draws textures of four families in turn, uint8 [count, h, w, 3]."""
    rng = np.random.default_rng(seed)
    families = _rough, _waves, _cells, _dots
    return np.stack([_coloured(families[i % 4](rng, size_hw), rng) for i in range(count)])


def _rough(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """Noise whose power falls with frequency, stretched along one axis; [h, w]."""
    h, w = size_hw
    stretch = np.exp(rng.uniform(-1.5, 1.5))
    y, x = np.fft.fftfreq(h)[:, None] * h * stretch, np.fft.rfftfreq(w)[None] * w
    power = np.maximum(np.hypot(y, x), 1) ** -rng.uniform(0.5, 2.0)
    return np.fft.irfft2(np.fft.rfft2(rng.normal(size=size_hw)) * power, s=size_hw)


def _waves(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """One to three gratings, each bent by noise; [h, w]."""
    h, w = size_hw
    y, x = np.mgrid[:h, :w]
    bent = _rough(rng, size_hw)
    bent = bent / bent.std() * rng.uniform(0, 1.5)
    value = np.zeros(size_hw)
    for _ in range(rng.integers(1, 4)):
        angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(4), np.log(48)))
        wave = np.sin(2 * np.pi * (np.cos(angle) * y + np.sin(angle) * x) / period + bent)
        value += np.sign(wave) if rng.random() < 0.4 else wave
    return value


def _cells(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """Distance to the nearest of random points, as in cracked or scaly surfaces; [h, w]."""
    h, w = size_hw
    points = np.full(size_hw, 255, np.uint8)
    count = int(np.exp(rng.uniform(np.log(12), np.log(400))))
    points[rng.integers(0, h, count), rng.integers(0, w, count)] = 0
    distance, label = cv2.distanceTransformWithLabels(points, cv2.DIST_L2, 5)
    if rng.random() < 0.5:
        return distance.astype(float)
    return rng.random(label.max() + 1)[label]


def _dots(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """Dots of one or several sizes on a smooth ground; [h, w]."""
    h, w = size_hw
    value = cv2.GaussianBlur(rng.normal(size=size_hw), (0, 0), 16)
    value = value / value.std() * 0.2
    for _ in range(int(np.exp(rng.uniform(np.log(10), np.log(300))))):
        centre = int(rng.integers(0, w)), int(rng.integers(0, h))
        cv2.circle(value, centre, int(rng.integers(1, 12)), float(rng.uniform(-2, 2)), -1)
    return value


def _coloured(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Levels in three random colours, dark to bright, with grain; uint8 [h, w, 3]."""
    rank = (value - value.min()) / max(np.ptp(value), 1e-9)
    colours = rng.uniform(0, 255, (3, 3)) if rng.random() < 0.7 else rng.uniform(0, 255, (3, 1))
    colours = np.broadcast_to(colours, (3, 3))
    mixed = np.stack([np.interp(rank, (0, 0.5, 1), colours[:, c]) for c in range(3)], axis=-1)
    mixed += rng.normal(0, rng.uniform(0, 12), (*value.shape, 1))
    return np.clip(np.round(mixed), 0, 255).astype(np.uint8)
