"""The layout in memory of weights that a program reads and does not change.

Scoring changes no weights; training does not change the teacher's. `place` casts and transposes
such weights once, as layers and kernels would in every call or step. A program takes the placed
weights and begins with `restore`, which XLA reduces to nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mmrjax.runtime import devices

BLOCKS = "['blocks']"  # of an encoder; their leaves are stacked: [depth, ...]


@jax.tree_util.register_dataclass  # flattened in C++, unlike Flax's: in every call
@dataclasses.dataclass(frozen=True)
class Layers:
    """A stacked leaf as an array per layer: a GPU would copy every slice of the stack."""

    parts: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputsFirst:
    """The kernel of a convolution, [out, height, width, in] as cuDNN reads it."""

    kernel: jax.Array


def place(tree: dict, dtype: jnp.dtype, unroll: int = 1) -> dict:
    """`lay_out` for the devices at hand."""
    return lay_out(tree, dtype, devices.on_nvidia() and dtype == jnp.bfloat16, unroll)


def lay_out(tree: dict, dtype: jnp.dtype, on_gpu: bool, unroll: int = 1) -> dict:
    """Weights as programs read them.

    Args:
      tree: variables of Flax modules, nested dictionaries, or several of them.
      dtype: type of the modules' computations. Kernels and their biases are cast to it, as layers
        would in every call; in bfloat16 a call reads half as much. Other leaves keep their type.
      on_gpu: also transposes the kernels of convolutions and takes stacks of blocks apart.
      unroll: blocks that the program computes without a loop. Longer stacks are not taken apart: a
        loop needs the stack.

    Returns:
      The same tree with Layers and OutputsFirst in place of some leaves, for `restore`. Unchanged
      leaves are not copied.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    known = {name for name, _ in named}

    def how(name: str, leaf: jax.Array) -> str:
        is_kernel = name.endswith("kernel']")
        is_bias = name.endswith("bias']") and name.removesuffix("bias']") + "kernel']" in known
        if not (is_kernel or is_bias):  # norms read their leaves as they are
            return ""
        if on_gpu and BLOCKS in name and leaf.shape[0] <= unroll:
            return "layers"
        # [height, width, in, out]; a transposed convolution has [in, height, width, out].
        if on_gpu and leaf.ndim == 4 and leaf.shape[0] == leaf.shape[1]:
            return "outputs first"
        return "" if leaf.dtype == dtype else "cast"

    kinds = tuple(how(name, leaf) for name, leaf in named)
    changed = [leaf for kind, (_, leaf) in zip(kinds, named, strict=True) if kind]
    turned = iter(_turned(changed, tuple(filter(None, kinds)), dtype) if changed else ())
    placed = [next(turned) if kind else leaf for kind, (_, leaf) in zip(kinds, named, strict=True)]
    return jax.tree.unflatten(structure, placed)


@functools.partial(jax.jit, static_argnums=(1, 2))  # a single program for all leaves
def _turned(leaves: list[jax.Array], kinds: tuple[str, ...], dtype: jnp.dtype) -> list:
    turn = {
        "cast": lambda x: x,
        "layers": lambda x: Layers(tuple(x)),
        "outputs first": lambda x: OutputsFirst(x.transpose(3, 0, 1, 2)),
    }
    return [turn[kind](leaf.astype(dtype)) for kind, leaf in zip(kinds, leaves, strict=True)]


def restore(tree: dict) -> dict:
    """The tree that `lay_out` was given, except for the casts; to be called in a program."""

    def take(leaf):
        if isinstance(leaf, Layers):
            return jnp.stack(leaf.parts)
        if isinstance(leaf, OutputsFirst):
            return leaf.kernel.transpose(1, 2, 3, 0)
        return leaf

    return jax.tree.map(take, tree, is_leaf=lambda x: isinstance(x, Layers | OutputsFirst))
