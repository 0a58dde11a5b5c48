"""Test images as in dim light: a stress that changes pictures, never labels (MMR+ spec, section 8).

Light is scaled by a gain, in the linear scale of a gamma of 2.2, and counted as photons. Which
noise an image gets follows from its id, so every method and every call sees the same picture.
"""

import zlib

import numpy as np

GAMMA = 2.2  # grey level = light ** (1 / GAMMA)
GAIN = 0.4  # share of the light that is left
PEAK = 60  # photons per pixel and channel of the brightest white before the gain


def darken(image: np.ndarray, name: str) -> np.ndarray:
    """A picture in 40 % of the light, with its photon noise.

    Args:
      image: uint8 [h, w, 3].
      name: id of the record; it seeds the noise.

    Returns:
      uint8 [h, w, 3].
    """
    light = (np.arange(256) / 255) ** GAMMA * GAIN * PEAK
    photons = np.random.default_rng(zlib.crc32(name.encode())).poisson(light[image])
    return np.round(255 * np.minimum(photons / PEAK, 1.0) ** (1 / GAMMA)).astype(np.uint8)
