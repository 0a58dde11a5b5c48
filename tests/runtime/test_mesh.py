"""The mesh: how batches and large parameters are split, and that splitting changes no result."""

import functools
import json

import jax
import numpy as np
import optax
import pytest

from data_builders import build
from mmrjax import methods
from mmrjax.data import epochs, splits
from mmrjax.data import records as records_lib
from mmrjax.methods import base
from mmrjax.runtime import checkpoint, devices
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import loop, step

FIELDS = (
    "data.image_size=32,32",
    "data.resize=32,32",
    "student.depth=1",
    "student.layers=3",
    "train.augment=none",
    "train.epochs=3",
    "optim.warmup=0",
)
STAGE = base.Stage("train", epochs=1, plan=epochs.Plan(8), tx=optax.adamw(1e-3))


def shard_shapes(array) -> set[tuple[int, ...]]:
    return {shard.data.shape for shard in array.addressable_shards}


# --- placements


@pytest.mark.parametrize(("devices", "fsdp", "shape"), [(None, 1, (8, 1)), (4, 2, (2, 2))])
def test_mesh_has_a_data_axis_and_an_fsdp_axis(devices, fsdp, shape):
    mesh = mesh_lib.make_mesh(devices, fsdp)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == shape


def test_fsdp_that_does_not_divide_the_devices_names_what_does():
    wanted = "train.fsdp=3 must divide the 8 devices; try one of 1, 2, 4, 8"
    with pytest.raises(ValueError, match=wanted):
        mesh_lib.make_mesh(fsdp=3)


@pytest.mark.parametrize(
    ("batch", "near"), [(12, "try 8 or 16"), (3, "try 8$"), (17, "try 16 or 24")]
)
def test_batch_that_does_not_divide_names_both_numbers_and_the_nearest(batch, near):
    for fsdp in (1, 2):  # the batch is split over both axes
        mesh = mesh_lib.make_mesh(fsdp=fsdp)
        wanted = f"train.batch_size={batch} must be divisible by 8 devices; {near}"
        with pytest.raises(ValueError, match=wanted):
            mesh_lib.check_divisible("train.batch_size", batch, mesh)
        mesh_lib.check_divisible("train.batch_size", 16, mesh)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_batch_is_split_over_all_devices(fsdp, axis):
    mesh = mesh_lib.make_mesh(fsdp=fsdp)
    batch = np.arange(16 * 16).reshape(16, 16)
    placed = mesh_lib.put_batch(batch, mesh, axis)
    assert shard_shapes(placed) == {(2, 16) if axis == 0 else (16, 2)}
    np.testing.assert_array_equal(mesh_lib.gather(placed), batch)


def test_one_process_owns_all_rows_and_host_arrays_stay_as_they_are():
    mesh = mesh_lib.make_mesh()
    assert mesh_lib.own_rows(16, mesh).tolist() == [True] * 16
    array = np.arange(16)
    assert mesh_lib.complete(array, mesh) is array


@pytest.mark.parametrize("count", [16, 13])
def test_spread_rows_are_whole_on_every_device(count):
    mesh = mesh_lib.make_mesh(fsdp=2)
    array = np.arange(16 * 3).reshape(16, 3)
    spread = mesh_lib.spread(mesh_lib.put_batch(array, mesh), mesh, count)
    assert shard_shapes(spread) == {(count, 3)}
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_array_equal(spread, array[:count])


def test_only_large_parameters_are_split_along_their_longest_axis_that_divides():
    mesh = mesh_lib.make_mesh(fsdp=4)
    shapes = {
        "tall": ((512, 256), (128, 256)),
        "wide": ((3, 3, 64, 512), (3, 3, 64, 128)),
        "longest does not divide": ((1023, 400), (1023, 100)),
        "nothing divides": ((1023, 401), (1023, 401)),
        "small": ((64, 64), (64, 64)),
        "scalar": ((), ()),
    }
    tree = {name: np.zeros(shape, np.float32) for name, (shape, _) in shapes.items()}
    placed = mesh_lib.put(tree, mesh_lib.fsdp_shardings(tree, mesh))
    for name, (_, expected) in shapes.items():
        assert shard_shapes(placed[name]) == {expected}, name
    alone = mesh_lib.fsdp_shardings(tree, mesh_lib.make_mesh())
    assert all(sharding.is_fully_replicated for sharding in alone.values())


def test_moments_are_split_as_their_parameters_and_the_rest_of_the_state_is_whole():
    mesh = mesh_lib.make_mesh(fsdp=2)
    large = np.zeros((512, 256), np.float32)
    made = step.create({"params": {"w": large}, "positions": {"t": large}}, STAGE)
    placed = mesh_lib.put(made, step.shardings(made, mesh))
    moments = [leaf for leaf in jax.tree.leaves(placed.opt_state) if leaf.ndim]
    assert len(moments) == 2
    assert [shard_shapes(leaf) for leaf in moments] == [{(256, 256)}] * 2
    assert shard_shapes(placed.params["w"]) == {(256, 256)}
    assert shard_shapes(placed.collections["positions"]["t"]) == {(512, 256)}
    assert shard_shapes(placed.step) == {()}


@pytest.mark.parametrize(("saved", "restored"), [(1, 2), (2, 1), (2, 8)])
def test_checkpoint_restores_with_another_fsdp(tmp_path, saved, restored):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(512, 256)).astype(np.float32), "b": np.ones(7, np.float32)}
    made = step.create({"params": params}, STAGE)
    made = made.replace(opt_state=jax.tree.map(lambda x: x + 3, made.opt_state))
    meshes = {fsdp: mesh_lib.make_mesh(fsdp=fsdp) for fsdp in (saved, restored)}
    placed = {n: mesh_lib.put(made, step.shardings(made, mesh)) for n, mesh in meshes.items()}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, placed[saved])
        checkpoints.wait()
        _, found = checkpoints.restore(placed[restored])
    jax.tree.map(np.testing.assert_array_equal, found, made)
    assert shard_shapes(found.params["w"]) == {(512 // restored, 256)}
    for now, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(placed[restored]), strict=True):
        assert now.sharding.is_equivalent_to(wanted.sharding, now.ndim)


# --- training


@pytest.fixture(scope="module")
def trained(tiny_raw, tiny_config, tmp_path_factory):
    """{fsdp: (`Trained`, folder)} of a short training on four devices, with small arrays split."""
    home = tmp_path_factory.mktemp("fsdp")
    records = records_lib.load(
        build.build("folder", tiny_raw, home, log=lambda line: None)["parts"]
    )
    rows, _ = splits.select(records, "one_class")

    def run(fsdp: int, folder):
        config = tiny_config.copy_and_resolve_references()
        config_lib.override(config, (*FIELDS, f"train.fsdp={fsdp}"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mesh_lib, "make_mesh", functools.partial(mesh_lib.make_mesh, 4))
            patch.setattr(mesh_lib, "FSDP_ELEMENTS", 1000)
            return loop.train(methods.create("mmr", config), records.take(rows), 3, folder), folder

    return {fsdp: run(fsdp, home / f"fsdp{fsdp}") for fsdp in (1, 2)}


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def test_splitting_the_parameters_changes_no_result(trained):
    (whole, folder), (split, other) = trained[1], trained[2]
    assert len(losses(folder)) == 6
    assert losses(folder)[-1] < losses(folder)[0]
    np.testing.assert_allclose(losses(other), losses(folder), rtol=0, atol=1e-5)
    images = np.random.default_rng(0).uniform(0, 1, (8, 32, 32, 3)).astype(np.float32)
    scores = [
        jax.jit(one.method.predict)(one.variables, one.frozen, mesh_lib.put_batch(images, one.mesh))
        for one in (whole, split)
    ]
    np.testing.assert_allclose(scores[1]["map"], scores[0]["map"], rtol=0, atol=1e-5)


def test_parameters_are_split_after_training_too(trained):
    whole, split = (jax.tree.leaves(trained[fsdp][0].variables["params"]) for fsdp in (1, 2))
    assert all(shard_shapes(leaf) == {leaf.shape} for leaf in whole)
    halves = [leaf for leaf in split if leaf.size >= 1000]
    assert len(halves) > 5
    for leaf in halves:
        assert {np.prod(shape) for shape in shard_shapes(leaf)} == {leaf.size // 2}


# --- cores as devices


def test_shown_cores_share_the_batches_of_a_run_others_have_to_divide_them(monkeypatch):
    assert mesh_lib.make_mesh(batch_sizes=(12, 32)).size == 8
    monkeypatch.setattr(devices, "are_shown_cores", lambda: True)
    assert mesh_lib.make_mesh(batch_sizes=(12, 32)).size == 4
    assert mesh_lib.make_mesh(batch_sizes=(15, 32)).size == 1
    assert mesh_lib.make_mesh().size == 8
