"""The training state and the one jitted, sharded, donated training step.

`jax.jit` over a mesh is what pmap and pjit became: the state is replicated or, for large students,
split over the axis "fsdp" (runtime/mesh.py); the batch is split.
"""

from collections.abc import Callable

import flax.serialization
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from mmrjax.data.augment import Augment
from mmrjax.data.defects import rows as defect_rows
from mmrjax.methods import base, optim
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.runtime import placement

SECOND = 0x2ED  # folded into an example's key: the crop of its second picture


@flax.struct.dataclass
class TrainState:
    """Everything that a stage of training changes, and the parameters that it leaves alone.

    Attributes:
      step: int32 scalar, updates of this stage done so far; also the position in the data.
      params: parameters that the stage trains, float32.
      fixed: the other parameters, for which there is no gradient and no optimiser state.
      collections: all other variables of the method (position tables, statistics, memory banks).
      opt_state: state of the optimiser, or {name: state} of several.
    """

    step: jax.Array
    params: dict
    fixed: dict
    collections: dict
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        """The variables that the method's `loss` and `predict` take."""
        return {"params": merged(self.params, self.fixed), **self.collections}


def split(params: dict, trained: Callable[[str], bool]) -> tuple[dict, dict]:
    """Parameters as (those whose path is `trained`, the others); nested dicts both."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    parts = ({k: x for k, x in flat.items() if trained(k) == kind} for kind in (True, False))
    return tuple(flax.traverse_util.unflatten_dict(part, sep="/") for part in parts)


def merged(params: dict, fixed: dict) -> dict:
    """The parameters that `split` took apart."""
    if not fixed:
        return params
    flat = [flax.traverse_util.flatten_dict(part) for part in (params, fixed)]
    return flax.traverse_util.unflatten_dict(flat[0] | flat[1])


def create(variables: dict, stage: base.Stage) -> TrainState:
    """The state before the first step of a stage.

    Raises:
      ValueError: the stage trains nothing, or an optimiser has no parameters of its name.
    """
    collections = {name: value for name, value in variables.items() if name != "params"}
    params, fixed = split(variables["params"], stage.trained)
    if not params:
        raise ValueError(f"stage {stage.name!r} trains no parameter")
    return TrainState(
        jnp.zeros((), jnp.int32), params, fixed, collections, optim.start(stage.tx, params)
    )


def shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """The shardings of a state: large parameters and their moments split over "fsdp"."""
    everywhere = jax.tree.map(lambda _: mesh_lib.replicated(mesh), state)
    return everywhere.replace(
        params=mesh_lib.fsdp_shardings(state.params, mesh),
        fixed=mesh_lib.fsdp_shardings(state.fixed, mesh),
        opt_state=mesh_lib.fsdp_shardings(state.opt_state, mesh),
    )


def to_tree(state: TrainState) -> dict:
    """A state as nested dicts of arrays, as checkpoints hold it; read without an optimiser."""
    flat = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(state))
    return flax.traverse_util.unflatten_dict(flat)  # without empty nodes


def from_tree(like: TrainState, tree: dict) -> TrainState:
    """The inverse of `to_tree`, in the structure of another state."""
    nodes = flax.serialization.to_state_dict(like)
    flat = flax.traverse_util.flatten_dict(nodes, keep_empty_nodes=True)
    flat |= flax.traverse_util.flatten_dict(tree)
    return flax.serialization.from_state_dict(like, flax.traverse_util.unflatten_dict(flat))


def variables_of(tree: dict) -> dict:
    """The variables in what `to_tree` made of a state."""
    params = merged(tree.get("params", {}), tree.get("fixed", {}))
    return {"params": params, **tree.get("collections", {})}


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Whether every trained parameter is a number, bool scalar."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]))


def update(
    method: base.Method,
    stage: base.Stage,
    state: TrainState,
    frozen: dict,
    batch: dict,
    key: jax.Array,
    progress: dict,
) -> tuple[TrainState, dict]:
    """One gradient step of `method.loss` over the parameters that the stage trains."""

    def loss_fn(params: dict) -> tuple[jax.Array, tuple[dict, dict]]:
        variables = {"params": merged(params, state.fixed), **state.collections}
        return method.loss(stage.name, variables, frozen, batch, key, progress)

    (loss, (collections, logs)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    params, opt_state = optim.descend(stage.tx, gradients, state.opt_state, state.params)
    state = state.replace(
        params=params,
        collections={**state.collections, **collections},
        opt_state=opt_state,
    )
    return state, {"loss": loss, **logs}


def make_batch(
    augment: Augment, plan, resident: dict, rows: dict, key: jax.Array, frozen: dict
) -> dict:
    """The batch of one step: pictures looked up, cropped, flipped and, if planned, with defects.

    Args:
      augment: (key, image, size) -> float32 [h, w, 3 or 4] in [0, 1].
      plan: an `epochs.Plan`.
      resident: as `feed.Feed.resident`.
      rows: the row of a chunk, see `feed.Feed.chunks`.
      key: PRNG key of the step.
      frozen: with `Method.extras`.

    Returns:
      The `batch` that `Method.loss` describes.
    """
    # A key per example: masks and crops do not depend on the number of devices.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows["index"])
    key_augment, key_method = jax.vmap(jax.random.split, out_axes=1)(keys)
    source = {name: array[rows["index"]] for name, array in resident.items()} or rows
    batch = {
        "image": jax.vmap(augment)(key_augment, source["image"], source["size"]),
        "weight": rows["weight"],
        "keys": key_method,
    }
    if batch["image"].shape[-1] == 4:  # cropped and flipped along
        batch["foreground"] = batch["image"][..., 3] > 0.5
        batch["image"] = batch["image"][..., :3]
    if "domain" in source:
        batch["domain"] = source["domain"]
    if "second" in rows:
        other = {name: array[rows["second"]] for name, array in resident.items()} or {
            name: rows[f"second_{name}"] for name in ("image", "size")
        }
        own = jax.vmap(jax.random.fold_in, (0, None))(key_augment, SECOND)
        batch["second"] = jax.vmap(augment)(own, other["image"], other["size"])[..., :3]
    if "defective" in rows:
        batch["defective"] = rows["defective"]
    if plan.defects is not None:
        batch = defect_rows.with_defects(plan.defects, batch, frozen)
    return batch


def make_train_step(
    method: base.Method,
    stage: base.Stage,
    augment: Augment,
    steps_per_epoch: int,
    mesh: jax.sharding.Mesh,
    state_shardings: TrainState | None = None,
) -> Callable:
    """Compiles the training step of a stage.

    Args:
      method: whose `loss` or whose stage's `update` is stepped.
      stage: its optimiser and its batches.
      augment: (key, image, size) -> training image.
      steps_per_epoch: to tell the method its epoch.
      mesh: devices.
      state_shardings: as `shardings`; None for a state that every device has whole.

    Returns:
      (state, frozen, resident, chunk, key) -> (state, logs): runs the steps of a chunk from
      `feed.Feed.chunks`; logs are float32 [k], and the state that comes in is given up. Teacher and
      images are arguments, since captured arrays would become constants of the program; the
      teacher comes as it is or from `placement.place`.
    """

    def one_step(state, frozen, resident, rows, key):
        frozen = placement.restore(frozen)
        key = jax.random.fold_in(key, state.step)
        progress = {"step": state.step, "epoch": state.step // steps_per_epoch}
        with method.precision():
            batch = make_batch(augment, stage.plan, resident, rows, key, frozen)
            if stage.update is not None:
                changed, logs = stage.update(state, frozen, batch, key, progress, stage.tx)
            else:
                changed, logs = update(method, stage, state, frozen, batch, key, progress)
        return changed.replace(step=state.step + 1), logs

    def train_step(state, frozen, resident, chunk, key):
        if chunk["index"].shape[0] == 1:  # no loop: XLA:CPU is slow on convolutions inside one
            rows = jax.tree.map(lambda x: x[0], chunk)
            state, logs = one_step(state, frozen, resident, rows, key)
            return state, jax.tree.map(lambda x: x[None], logs)
        return jax.lax.scan(
            lambda state, rows: one_step(state, frozen, resident, rows, key), state, chunk
        )

    replicated = mesh_lib.replicated(mesh)
    where = state_shardings or replicated
    return jax.jit(train_step, donate_argnums=0, out_shardings=(where, replicated))
