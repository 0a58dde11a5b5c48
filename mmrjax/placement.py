"""How weights lie in memory that a program reads and does not change.

All of them are so in scoring, the teacher's in training too. Whatever layers and kernels would make
of them in every call or step is made of them once: `place`. A program takes them as they lie and
begins with `restore`, which XLA reduces to nothing. Called by train.py, state.py and scoring.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

BLOCKS = "['blocks']"  # of an encoder, whose leaves are stacked: [depth, ...]


@jax.tree_util.register_dataclass  # flattened in C++, unlike Flax's: in every call
@dataclasses.dataclass(frozen=True)
class Layers:
    """A stacked leaf, an array for each layer: a GPU would copy every slice of it."""

    parts: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputsFirst:
    """The kernel of a convolution, [out, height, width, in] as cuDNN reads it."""

    kernel: jax.Array


def place(tree: dict, dtype: jnp.dtype) -> dict:
    """`lay_out` for the devices at hand, in one program."""
    on_gpu = jax.default_backend() == "gpu"
    return jax.jit(lay_out, static_argnums=(1, 2))(tree, dtype, on_gpu)


def lay_out(tree: dict, dtype: jnp.dtype, on_gpu: bool) -> dict:
    """Weights as programs read them.

    Args:
      tree: variables of Flax modules, nested dictionaries, or several of them.
      dtype: in which the modules compute. Kernels and their biases, which layers would cast in
        every call, lie in it; in bfloat16 a call reads half as much. The rest stays as it is.
      on_gpu: also takes stacked leaves apart and turns the kernels of convolutions.

    Returns:
      The same tree with Layers and OutputsFirst in place of some leaves, for `restore`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    known = set(names)

    def turn(name: str, leaf: jax.Array) -> jax.Array | Layers | OutputsFirst:
        of_bias = name.endswith("bias']") and name.removesuffix("bias']") + "kernel']" in known
        is_kernel = name.endswith("kernel']")
        if is_kernel or of_bias:
            leaf = leaf.astype(dtype)
        if on_gpu and BLOCKS in name and (is_kernel or of_bias):  # norms are read where they lie
            return Layers(tuple(leaf))
        if on_gpu and is_kernel and leaf.ndim == 4:
            return OutputsFirst(leaf.transpose(3, 0, 1, 2))
        return leaf

    placed = [turn(name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, placed)


def restore(tree: dict) -> dict:
    """The tree that `lay_out` was given, but for the casts; to be called in a program."""

    def take(leaf):
        if isinstance(leaf, Layers):
            return jnp.stack(leaf.parts)
        if isinstance(leaf, OutputsFirst):
            return leaf.kernel.transpose(1, 2, 3, 0)
        return leaf

    return jax.tree.map(take, tree, is_leaf=lambda x: isinstance(x, Layers | OutputsFirst))
