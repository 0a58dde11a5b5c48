"""Formula weights and inputs for the golden values. Needs numpy only; no official code in here.

hash32(key, n): for i = 0..n-1, in unsigned 32-bit arithmetic (all products and sums mod 2**32):
    h = i * 2654435761 + crc32(key)          crc32 = zlib.crc32 of the UTF-8 bytes of the key
    h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16      (murmur3
    finaliser)
unit(key, n) = h / 2**32 - 0.5  in float64, i.e. uniform in [-0.5, 0.5).

formula_weights(key, shape): v is computed in float64 and rounded to float32 once. First rule that
fits:
    key ends with "num_batches_tracked" or shape == ()   0
    "token", "pos_embed" or "x_inpaint" in key           u
    1-d, key ends with "running_mean"                    0.2 * u
    1-d, key ends with "running_var"                     1 + 0.5 * u
    1-d, key ends with "bias"                            0.2 * u
    other 1-d (norm weights, LayerScale gamma)           1 + 0.4 * u
    2-d (linear)                                         2 * sqrt(3 / fan_in) * u      variance 1
    / fan_in
    3-d and more (convolutions, transposed too)          2 * sqrt(6 / fan_in) * u      variance 2
    / fan_in
  fan_in = product of all dims but the first; elements in C order of the torch layout (OIHW;
  transposed conv IOHW).
The key is the official state_dict key, with the prefix written in the case's README in front of
it (several networks
have equal keys; hidden cases use another prefix).
"""

import zlib

import numpy as np

TOKENS = ("token", "pos_embed", "x_inpaint")


def hash32(key, n):
    h = np.arange(n, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(zlib.crc32(key.encode()))
    h = h.astype(np.uint32)  # mod 2**32
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def unit(key, n):
    return hash32(key, n).astype(np.float64) / 2.0**32 - 0.5


def formula_weights(key, shape):
    shape = tuple(int(s) for s in shape)
    if key.endswith("num_batches_tracked") or shape == ():
        return np.zeros(shape, np.int64 if key.endswith("num_batches_tracked") else np.float32)
    n = int(np.prod(shape))
    u = unit(key, n).reshape(shape)
    if any(t in key for t in TOKENS):
        v = u
    elif len(shape) == 1:
        if key.endswith("running_mean") or key.endswith("bias"):
            v = 0.2 * u
        elif key.endswith("running_var"):
            v = 1.0 + 0.5 * u
        else:
            v = 1.0 + 0.4 * u
    else:
        v = 2.0 * np.sqrt((3.0 if len(shape) == 2 else 6.0) / np.prod(shape[1:])) * u
    return v.astype(np.float32)


def formula_image(key, shape):
    """(N,C,H,W) float32 in [0,1): 3/4 bilinear 8-px value noise + 1/4 pixel noise, all dyadic.

    coarse grid (H//8+2, W//8+2) of integers 0..255 from hash32(key + "/coarse") >> 24, fine
    0..255 from
    hash32(key + "/fine") >> 24; value = (0.75 * bilinear(coarse) + 0.25 * fine) / 256, bilinear
    with weights (y%8)/8.
    """
    n, c, h, w = shape
    gh, gw = h // 8 + 2, w // 8 + 2
    g = (
        (hash32(key + "/coarse", n * c * gh * gw) >> np.uint32(24))
        .astype(np.float64)
        .reshape(n, c, gh, gw)
    )
    f = (
        (hash32(key + "/fine", n * c * h * w) >> np.uint32(24))
        .astype(np.float64)
        .reshape(n, c, h, w)
    )
    y, x = np.arange(h), np.arange(w)
    a, b = (y % 8 / 8.0)[:, None], (x % 8 / 8.0)[None, :]
    y0, x0 = y // 8, x // 8
    t = g[:, :, y0][:, :, :, x0] * (1 - b) + g[:, :, y0][:, :, :, x0 + 1] * b
    s = g[:, :, y0 + 1][:, :, :, x0] * (1 - b) + g[:, :, y0 + 1][:, :, :, x0 + 1] * b
    return ((0.75 * (t * (1 - a) + s * a) + 0.25 * f) / 256.0).astype(np.float32)


def formula_noise(key, shape):
    """float32 in [0,1), distinct with near certainty: (hash32 >> 8) / 2**24."""
    n = int(np.prod(shape))
    return (
        ((hash32(key, n) >> np.uint32(8)).astype(np.float64) / 2.0**24)
        .astype(np.float32)
        .reshape(shape)
    )


def digest(a, count=2048):
    """The stored part of a large array: every step-th value, and seven numbers about it."""
    a = np.asarray(a)
    step = -(-a.size // count)
    return a.ravel()[::step], np.array(
        [a.mean(), a.std(), np.abs(a).sum(), a.min(), a.max(), a.size, step], np.float64
    )


if __name__ == "__main__":  # self-test values
    print(
        hash32("a", 3),
        formula_weights("conv.weight", (2, 3, 1, 1)).ravel(),
        formula_weights("bn.bias", (2,)),
    )
    im = formula_image("x", (1, 3, 16, 16))
    print(im.sum(dtype=np.float64), im.min(), im.max())
