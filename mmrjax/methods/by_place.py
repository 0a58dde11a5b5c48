"""Maps in standard deviations of the good training images at the same place, for every method.

A good part differs from the prediction, or from the bank, more at some places than at others: at an
edge, a number, the border of the picture. Means and deviations of the training maps, pixel by
pixel, tell how much; what is left over is comparable between places, and so is the maximum that
makes the score of an image. No method's paper has this step. PaDiM (arXiv 2011.08785) keeps
statistics by place, of features; here it is the finished maps, so it serves any method. It wants
pictures in which the same place means the same: parts in a fixture, surfaces that fill the picture.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmrjax.methods import base
from mmrjax.runtime import mesh

SMALLEST = 0.1  # deviation of a place, over the mean of all: quiet places must not outweigh others


class ByPlace:
    """Mixed into a method: a fit that learns the statistics, a prediction that uses them."""

    def fit(
        self, variables: dict, frozen: dict, batches: Iterable, count: int, key: jax.Array
    ) -> dict:
        """The method's own fit, if it has one, then the statistics, as the collection "places"."""
        if super().fit is not None:
            variables = super().fit(variables, frozen, batches, count, key)
        plain = super().predict
        predict = jax.jit(lambda *arguments: plain(*arguments)["parts"])
        found = ((mesh.gather(predict(variables, frozen, images)), n) for images, n in batches)
        places = statistics({name: x[:n] for name, x in maps.items()} for maps, n in found)
        return {**variables, "places": places}

    def predict(self, variables: dict, frozen: dict, images: jax.Array) -> dict:
        """The method's parts, each in standard deviations, and their sum."""
        return standardised(super().predict(variables, frozen, images), variables["places"])

    def leave_out(self, variables: dict, frozen: dict, images: jax.Array, away: jax.Array) -> dict:
        """As the method leaves images out; the statistics stay those of all training images."""
        found = super().leave_out(variables, frozen, images, away)
        return standardised(found, variables["places"])

    def score(self, maps: jax.Array) -> jax.Array:
        """The maximum, for every method."""
        return maps.max(axis=(1, 2))

    @classmethod
    def check_run(cls, config: ConfigDict, images: int) -> None:
        """Raises ValueError if statistics of so many training images would mean nothing."""
        super().check_run(config, images)
        if images < 2:
            raise ValueError(
                "--config.score.by_place compares training images with each other and needs two "
                f"or more, not {images}; add images or give False"
            )


def standardised(found: dict, places: dict) -> dict:
    """A method's prediction with each part in standard deviations, and their sum as the map."""
    parts = {k: (x - places[k]["mean"]) / places[k]["std"] for k, x in found["parts"].items()}
    return {"map": sum(parts.values()), "parts": parts}


def statistics(batches: Iterable[dict[str, np.ndarray]]) -> dict[str, dict[str, jax.Array]]:
    """Mean and standard deviation of maps at each place.

    Args:
      batches: {name: float32 [b, h, w]}, of one image or more each.

    Returns:
      {name: {"mean": float32 [h, w], "std": float32 [h, w]}}; a deviation is at least a tenth of
      the mean of all, and positive.
    """
    count, mean, squares = 0, {}, {}
    for maps in batches:  # of Chan et al. 1983: a difference of large sums would cancel
        own = len(next(iter(maps.values())))
        for name, x in maps.items():
            x = np.asarray(x, np.float64)
            shift = x.mean(0) - mean.get(name, 0.0)
            between = shift**2 * count * own / (count + own)
            squares[name] = squares.get(name, 0.0) + x.var(0) * own + between
            mean[name] = mean.get(name, 0.0) + shift * own / (count + own)
        count += own
    places = {}
    for name, total in squares.items():
        std = np.sqrt(total / count)
        std = np.maximum(std, SMALLEST * std.mean() + np.finfo(np.float32).tiny)
        places[name] = {"mean": mean[name], "std": std}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), places)


def of(kind: type[base.Method]) -> type[base.Method]:
    """The method `kind` with maps by place, under the same names."""
    own = {"__doc__": kind.__doc__} | ({"leave_out": None} if kind.leave_out is None else {})
    return type(kind.__name__, (ByPlace, kind), own)
