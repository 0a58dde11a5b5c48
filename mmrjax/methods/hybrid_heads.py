"""Which attention heads of MMR+'s student see a window or a lattice, and how hard the limits are.

The limits themselves stand in models/attention.py. Spec: MMR+, section 1.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmrjax.models import attention, masking
from mmrjax.models.student import MaskedStudent
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh

SOFT = 30.0  # the penalty at the end of the soft start, from 0
GATHER_FROM = 784  # patches; below, masking all pairs is no slower
SAMPLED = 0.25  # share of patches that global heads see under "random"
SAMPLE = 0x5A  # folded into an example's key: which patches


def defaults() -> dict:
    """The fields of `config.mmr_plus` that this module reads."""
    return {
        "hybrid": True,  # attention limited per head; no new parameters
        "local_heads": 0.5,  # share of heads that see a window, rounded down; the others: sparse
        # Which heads are local: fixed (the first) | by_distance (those that look least far before
        # training) | auto (by_distance if the student begins pretrained)
        "heads": "auto",
        "window": 3,  # patches, odd
        "sampling": "lattice",  # of global heads: lattice | random (a quarter of the keys) | full
        "stride": 2,  # of the lattice, whose phase rotates from layer to layer
        "layers": "all",  # that are hybrid: all | last_half | alternate
        "soft_start": 20 / 200,  # share of the epochs until the limits are hard; 0: from the start
    }


def check(config: ConfigDict) -> None:
    """Raises ValueError for values of these fields that cannot work."""
    choices = {
        "mmr_plus.heads": ("auto", "fixed", "by_distance"),
        "mmr_plus.sampling": ("lattice", "random", "full"),
        "mmr_plus.layers": ("all", "last_half", "alternate"),
    }
    config_lib.check_choices(config, choices)
    config_lib.check_ranges(
        config,
        ("mmr_plus.local_heads", 0.0, 1.0),
        ("mmr_plus.window", 1, 1 << 10),
        ("mmr_plus.stride", 1, 1 << 10),
        ("mmr_plus.soft_start", 0.0, 0.9),  # the last epochs train what is evaluated
    )
    config_lib.check_odd(config, "mmr_plus.window")


def hybrid(options: ConfigDict, student: MaskedStudent) -> attention.Hybrid | None:
    """The limits that `config.mmr_plus` sets to the heads of a student; None: no limits."""
    if not options.hybrid:
        return None
    far = attention.FULL if options.sampling == "full" else attention.GLOBAL
    local = int(options.local_heads * student.heads + 1e-9)
    kinds = attention.fixed_kinds(student.depth, student.heads, local, options.layers, far)
    return attention.Hybrid(kinds, options.window, options.stride)


def by_distance(
    student: MaskedStudent,
    variables: dict,
    normalise: Callable[[jax.Array], jax.Array],
    batches: Iterable[tuple[jax.Array, int]],
) -> tuple[np.ndarray, dict]:
    """Makes those heads local that look least far before training.

    Args:
      student: with hybrid attention.
      variables: its variables.
      normalise: that of the images that the student sees.
      batches: (images float32 [b, h, w, 3] in [0, 1], number of real rows).

    Returns:
      (int [depth, heads], the kind of each head; facts for results.json).
    """

    @jax.jit
    def distances(variables, images):
        _, kept = student.apply(variables, normalise(images), penalty=0.0, mutable="intermediates")
        # Queries and keys, [depth, b, 1 + n, heads, c] each.
        (pair,) = kept["intermediates"]["encoder"]["blocks"]["attn"]["queries_keys"]
        grid = tuple(side // student.patch for side in images.shape[1:3])
        mean = jax.lax.map(lambda qk: attention.mean_distances(*qk, grid), pair)
        return jnp.moveaxis(mean, 1, 0)  # [b, depth, heads]

    measured = [mesh.gather(distances(variables, x))[:real] for x, real in batches]
    mean = np.concatenate(measured).mean(axis=0)  # [depth, heads]
    kinds = attention.shortest_local(mean, np.asarray(student.hybrid.kinds))
    local = [np.flatnonzero(row == attention.LOCAL).tolist() for row in kinds]
    return kinds, {"local_heads": local, "mean_distances": np.round(mean, 3).tolist()}


def limits(
    options: ConfigDict, student: MaskedStudent, batch: dict, epoch: jax.Array, last: int
) -> dict:
    """How hard the limits are in a training step, and the keys of global heads if random.

    The penalty on pairs beyond the limits grows until epoch `last`, then the limits are absolute.
    """
    if student.hybrid is None:
        return {}
    found = {}
    if last:
        found["penalty"] = jnp.where(epoch < last, SOFT * epoch / last, attention.HARD)
    if options.sampling == "random":
        found["sample"] = sample(batch["keys"], batch["image"].shape, student.patch)
    return found


def unmasked(
    options: ConfigDict, student: MaskedStudent, variables: dict, images: jax.Array
) -> dict:
    """Features of images of which nothing is masked, under hard limits.

    Random keys are drawn once and for all. On large grids keys are collected, if that is possible
    (see `attention.Hybrid`).
    """
    extra = {}
    if student.hybrid is not None and options.sampling == "random":
        extra["sample"] = sample(
            jax.random.split(jax.random.key(0), 1), images.shape, student.patch
        )
    if gathers(options, student, images.shape):
        student = student.clone(hybrid=dataclasses.replace(student.hybrid, gather=True))
    return student.apply(variables, images, **extra)


def sample(keys: jax.Array, shape: tuple[int, ...], patch: int) -> jax.Array:
    """A quarter of the patches of each key's image [b, h, w, 3], bool [b, n]."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, SAMPLE)
    n = shape[1] // patch * (shape[2] // patch)
    _, rank = masking.shuffle(masking.random_noise(keys, n))
    return rank < math.ceil(SAMPLED * n)


def gathers(options: ConfigDict, student: MaskedStudent, shape: tuple[int, ...]) -> bool:
    """Whether keys are collected: on large grids, if that is possible (see `attention.Hybrid`)."""
    n = shape[1] // student.patch * (shape[2] // student.patch)
    possible = options.sampling == "lattice" and options.layers == "all"
    return student.hybrid is not None and possible and n >= GATHER_FROM
