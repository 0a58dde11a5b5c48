"""Tables of names turned into conversions: PyTorch state dicts <-> mmrjax variables, and checks.

A table has one row (PyTorch key, path of our variable, layout) per tensor; `torch_names` holds the
tables of our networks. Layouts: linear (out, in) -> (in, out); convolution OIHW -> HWIO; transposed
convolution (in, out, kh, kw) -> (in, kh, kw, out); patch embedding OIHW -> (kh * kw * in, out);
position table [1, n, d] -> [n, d]. "{i}" in a key stands for the number of a block: our blocks are
stacked along a first axis.
"""

import math
import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from flax import traverse_util

State = dict[str, np.ndarray]
Name = tuple[str, str, str]
NAMES_IN_MESSAGE = 4

_TO_JAX = {
    "same": lambda x: x,
    "table": lambda x: x[0],
    "linear": lambda x: x.T,
    "conv": lambda x: x.transpose(2, 3, 1, 0),
    "deconv": lambda x: x.transpose(0, 2, 3, 1),
    "patch": lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
}
_TO_TORCH = {
    "same": lambda x: x,
    "table": lambda x: x[None],
    "linear": lambda x: x.T,
    "conv": lambda x: x.transpose(3, 2, 0, 1),
    "deconv": lambda x: x.transpose(0, 3, 1, 2),
    "patch": lambda x: x.reshape(*_patch_shape(len(x)), -1).transpose(3, 2, 0, 1),
}


def _patch_shape(values: int) -> tuple[int, int, int]:
    side = math.isqrt(values // 3)
    return side, side, 3


def flatten(variables: dict) -> dict:
    """{"params/encoder/norm/scale": leaf} of nested variables."""
    return traverse_util.flatten_dict(variables, sep="/")


def unflatten(flat: Mapping) -> dict:
    """The nested variables behind `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def from_torch(state: Mapping[str, np.ndarray], names: Iterable[Name], what: str) -> dict:
    """Builds float32 variables from a state dict; tensors that no row names are ignored.

    Raises:
      ValueError: naming the tensors that `state` lacks, or a block unlike the first one.
    """
    rows = [(_keys(state, key), path, layout, "{i}" in key) for key, path, layout in names]
    missing = [key for keys, *_ in rows for key in keys if key not in state]
    if missing:
        raise ValueError(f"not {what}: {len(missing)} tensors missing: {some(missing)}")
    flat = {}
    for keys, path, layout, stacked in rows:
        parts = [_move(_TO_JAX, layout, key, np.asarray(state[key], np.float32)) for key in keys]
        for key, part in zip(keys, parts, strict=True):
            if part.shape != parts[0].shape:
                given, first = np.shape(state[key]), np.shape(state[keys[0]])
                raise ValueError(f"not {what}: {key} has shape {given}, {keys[0]} has {first}")
        flat[path] = np.ascontiguousarray(np.stack(parts) if stacked else parts[0])
    return unflatten(flat)


def _keys(state: Mapping[str, np.ndarray], key: str) -> list[str]:
    """The keys that a row means: one for each block of a stack, at least one."""
    stack, numbered, _ = key.partition("{i}")
    if not numbered:
        return [key]
    numbers = {m[1] for m in map(re.compile(rf"{re.escape(stack)}(\d+)\.").match, state) if m}
    return [key.format(i=i) for i in range(len(numbers) or 1)]


def to_torch(variables: dict, names: Iterable[Name], what: str) -> State:
    """The state dict of variables, as views: no value is copied.

    Raises:
      ValueError: naming the variables that are absent.
    """
    flat, rows = flatten(variables), list(names)
    if missing := [path for _, path, _ in rows if path not in flat]:
        raise ValueError(f"not {what}: {len(missing)} variables missing: {some(missing)}")
    state = {}
    for key, path, layout in rows:
        value = np.asarray(flat[path])
        for i, part in enumerate(np.atleast_1d(value) if "{i}" in key else [value]):
            state[key.format(i=i)] = _move(_TO_TORCH, layout, path, part)
    return state


def _move(layouts: dict, layout: str, name: str, value: np.ndarray) -> np.ndarray:
    try:
        return layouts[layout](value)
    except (ValueError, IndexError) as e:
        raise ValueError(f"{name}: shape {value.shape} cannot be that of a {layout} tensor") from e


def contiguous(state: State) -> State:
    """A state dict with every array laid out row by row, as files need it."""
    return {key: np.ascontiguousarray(value) for key, value in state.items()}


def hollow(init, *args) -> dict:
    """The variables that a module's `init` would draw, as zeros that take no memory."""
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)


def check_fit(given: Mapping, wanted: Mapping, what: str, optional: Iterable[str] = ()) -> None:
    """Compares names and shapes of two state dicts; `optional` ones may be missing.

    Raises:
      ValueError: naming tensors of another shape with both shapes, missing and unexpected ones.
    """
    missing = [key for key in wanted if key not in given and key not in optional]
    unexpected = [key for key in given if key not in wanted]
    wrong = [
        f"{key}: given {given[key].shape} expected {wanted[key].shape}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    lines = [f"{len(v)} tensors {k}: {some(v)}" for k, v in found.items() if v]
    if lines:
        raise ValueError(f"{what}: {'; '.join(lines)}")


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - NAMES_IN_MESSAGE
    return ", ".join(names[:NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
