"""The training state and the one jitted, sharded, donated training step.

This is what pmap and pjit became: `jax.jit` over a mesh, state replicated or (large students, see
mesh.py) split, batch split.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mmrjax.methods import base
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.runtime import placement

Augment = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: int32 scalar, updates done so far; also the position in the data.
      params: trained parameters, float32.
      collections: all other variables of the method (position tables, statistics, memory banks).
      opt_state: of the optimiser.
    """

    step: jax.Array
    params: dict
    collections: dict
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        """What the method's `loss` and `predict` take."""
        return {"params": self.params, **self.collections}


def create(variables: dict, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    collections = {name: value for name, value in variables.items() if name != "params"}
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, collections, tx.init(params))


def shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Where a state's arrays lie: large parameters and their moments split over "fsdp"."""
    whole = jax.tree.map(lambda _: mesh_lib.replicated(mesh), state)
    return whole.replace(
        params=mesh_lib.fsdp_shardings(state.params, mesh),
        opt_state=mesh_lib.fsdp_shardings(state.opt_state, mesh),
    )


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Whether every parameter is a number, bool scalar."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]))


def update(
    method: base.Method,
    tx: optax.GradientTransformation,
    state: TrainState,
    frozen: dict,
    batch: dict,
    key: jax.Array,
    progress: dict,
) -> tuple[TrainState, dict]:
    """One gradient step of `method.loss` over `params`."""

    def loss_fn(params: dict) -> tuple[jax.Array, tuple[dict, dict]]:
        variables = {"params": params, **state.collections}
        return method.loss(variables, frozen, batch, key, progress)

    (loss, (collections, logs)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        collections={**state.collections, **collections},
        opt_state=opt_state,
    )
    return state, {"loss": loss, **logs}


def make_train_step(
    method: base.Method,
    tx: optax.GradientTransformation,
    augment: Augment,
    steps_per_epoch: int,
    mesh: jax.sharding.Mesh,
    state_shardings: TrainState | None = None,
) -> Callable:
    """Builds `train_step(state, frozen, resident, chunk, key) -> (state, logs)`.

    The state comes back where `state_shardings` says, or None: whole on every device.

    `chunk` holds k batches (see `data.feed.Feed.chunks`); with k > 1 they run in one dispatch.
    Logs are float32 [k]. The state is donated: the caller must not touch the old one again.
    Teacher and images are arguments, since captured arrays would become constants of the program;
    the teacher comes as it is or from `placement.place`.
    """

    def one_step(state, frozen, resident, rows, key):
        frozen = placement.restore(frozen)
        key = jax.random.fold_in(key, state.step)
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
        progress = {"step": state.step, "epoch": state.step // steps_per_epoch}
        if method.update is not None:
            return method.update(state, frozen, batch, key, progress)
        return update(method, tx, state, frozen, batch, key, progress)

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
