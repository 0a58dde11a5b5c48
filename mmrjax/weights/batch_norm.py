"""Convolutions with BatchNorm folded into kernel and bias, and back, for all families."""

from collections.abc import Iterable

import numpy as np

from mmrjax.weights import layouts
from mmrjax.weights.layouts import Name, State

PARTS = ("weight", "bias", "running_mean", "running_var")


def fold(state: State, names: Iterable[Name], epsilon: float) -> dict:
    """{"params"} with kernel and bias of each convolution, float32.

    w' = w * gamma / sqrt(var + epsilon), b' = beta - mean * gamma / sqrt(var + epsilon).

    Args:
      state: with all tensors that `names` names.
      names: (convolution key, BatchNorm key, variable path) each.
      epsilon: that of every BatchNorm.
    """
    flat = {}
    for conv, bn, path in names:
        gamma, beta, mean, var = (state[f"{bn}.{part}"].astype(np.float32) for part in PARTS)
        scale = gamma / np.sqrt(var + np.float32(epsilon))
        kernel = state[f"{conv}.weight"].astype(np.float32).transpose(2, 3, 1, 0) * scale
        flat[f"params/{path}/kernel"] = np.ascontiguousarray(kernel)
        flat[f"params/{path}/bias"] = beta - mean * scale
    return layouts.unflatten(flat)


def unfold(variables: dict, names: Iterable[Name], epsilon: float) -> State:
    """The state dict behind folded variables, as views; arguments as those of `fold`.

    BatchNorm has weight 1, mean 0 and variance 1 - epsilon, whose scale is exactly 1 in float32:
    folding it again gives the same bits.

    Raises:
      ValueError: naming the variables that are absent.
    """
    names = list(names)
    rows = [
        row
        for conv, bn, path in names
        for row in (
            (f"{conv}.weight", f"params/{path}/kernel", "conv"),
            (f"{bn}.bias", f"params/{path}/bias", "same"),
        )
    ]
    state = layouts.to_torch(variables, rows, "a teacher of this architecture")
    for _, bn, _ in names:
        ones = np.ones(state[f"{bn}.bias"].shape, np.float32)
        state |= {f"{bn}.weight": ones, f"{bn}.running_mean": 0 * ones}
        state[f"{bn}.running_var"] = ones - np.float32(epsilon)
    return state
