"""The training step: device count, chunking, compilation, donation, frozen teacher, epoch 0."""

import jax
import numpy as np
import pytest

from mmrjax import methods
from mmrjax.data import augment, epochs, geometry
from mmrjax.methods import base, optim
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.runtime import placement
from mmrjax.train import step as step_lib

STEPS = {}  # one compiled step per number of devices and schedule, shared by the tests


def setup(config, devices, steps_per_epoch=4):
    mesh = mesh_lib.make_mesh(devices)
    method = methods.create("mmr", config)
    frozen = mesh_lib.replicate(method.load_frozen()[0], mesh)
    variables, _ = method.init(jax.random.key(0), frozen)
    plan = epochs.Plan(8)
    stage = base.Stage("train", 3, plan, optim.optimiser(config.optim, 3, steps_per_epoch))
    rrc = augment.make_augment(config, config.train.augment)
    step = STEPS.setdefault(
        (devices, config.optim.warmup, config.train.compute_dtype),
        step_lib.make_train_step(method, stage, rrc, steps_per_epoch, mesh),
    )
    rng = np.random.default_rng(0)
    resident = {
        "image": rng.integers(0, 256, (20, 70, 80, 3), dtype=np.uint8),
        "size": np.tile(np.int32([[66, 78]]), (20, 1)),
    }
    initial = mesh_lib.replicate(step_lib.create(variables, stage), mesh)
    return mesh, step, initial, frozen, mesh_lib.replicate(resident, mesh)


def rows(first, k, batch=8):
    index = (np.arange(k * batch).reshape(k, batch) * 3 + first) % 20
    weight = np.ones((k, batch), np.float32)
    weight[-1, -3:] = 0
    return {"index": index.astype(np.int32), "weight": weight}


def run(config, devices, chunks):
    mesh, step, current, frozen, resident = setup(config, devices)
    losses = []
    for chunk in chunks:
        chunk = mesh_lib.put_batch(chunk, mesh, axis=1)
        current, logs = step(current, frozen, resident, chunk, jax.random.key(7))
        losses.extend(np.asarray(logs["loss"]))
    return np.array(losses), current, step


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.optim.warmup = 0.0
    return config


@pytest.fixture(scope="module")
def one_device(config):
    return run(config, 1, [rows(i, 1) for i in range(6)])


@pytest.mark.parametrize("devices", [4, 8])
def test_the_number_of_devices_does_not_change_the_loss_curve(config, one_device, devices):
    losses, current, step = run(config, devices, [rows(i, 1) for i in range(6)])
    np.testing.assert_allclose(losses, one_device[0], atol=1e-5)
    assert losses[0] != losses[-1]
    assert step._cache_size() == 1  # six steps, one compilation
    assert int(current.step) == 6


def test_several_steps_in_one_call_equal_single_ones(config, one_device):
    chunks = [
        jax.tree.map(lambda *x: np.concatenate(x), *(rows(i + j, 1) for j in range(3)))
        for i in (0, 3)
    ]
    losses, _, _ = run(config, 1, chunks)
    np.testing.assert_allclose(losses, one_device[0], atol=1e-5)


def test_streamed_batches_equal_resident_ones(config, one_device):
    mesh, step, current, frozen, resident = setup(config, 1)
    losses = []
    for i in range(3):
        chunk = rows(i, 1)
        streamed = {name: np.asarray(array)[chunk["index"]] for name, array in resident.items()}
        chunk = mesh_lib.put_batch({**chunk, **streamed}, mesh, axis=1)
        current, logs = step(current, frozen, {}, chunk, jax.random.key(7))
        losses.extend(np.asarray(logs["loss"]))
    np.testing.assert_allclose(losses, one_device[0][:3], atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_about_the_same_loss(config, one_device):
    config = config.copy_and_resolve_references()
    config.train.compute_dtype = "bfloat16"
    losses, current, _ = run(config, 1, [rows(i, 1) for i in range(3)])
    assert {leaf.dtype for leaf in jax.tree.leaves(current.params)} == {np.dtype("float32")}
    np.testing.assert_allclose(losses, one_device[0][:3], rtol=0.02)
    assert not np.array_equal(losses, one_device[0][:3])


def test_the_state_is_donated(config):
    mesh, step, current, frozen, resident = setup(config, 1)
    chunk = mesh_lib.put_batch(rows(0, 1), mesh, axis=1)
    step(current, frozen, resident, chunk, jax.random.key(7))
    assert jax.tree.leaves(current.params)[0].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, resident)))


def test_epoch_0_with_warm_up_moves_only_adams_moments(config):
    config = config.copy_and_resolve_references()
    config.optim.warmup = 0.5
    _, step, current, frozen, resident = setup(config, 1)
    before = jax.device_get(current.params)
    current, _ = step(current, frozen, resident, rows(0, 1), jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(current.params))
    moments = [
        np.abs(x).max() for x in jax.tree.leaves(jax.device_get(current.opt_state)) if x.ndim
    ]
    assert max(moments) > 0


def test_position_tables_never_move(config, one_device):
    _, _, initial, _, _ = setup(config, 1)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(initial.collections),
        jax.device_get(one_device[1].collections),
    )


def test_padding_rows_do_not_touch_the_update(config):
    _, step, first, frozen, resident = setup(config, 1)
    _, _, second, _, _ = setup(config, 1)
    chunk = rows(0, 1)
    other = {**chunk, "index": chunk["index"].copy()}
    other["index"][0, -3:] = 11  # other images in the rows of weight 0
    first, logs_a = step(first, frozen, resident, chunk, jax.random.key(7))
    second, logs_b = step(second, frozen, resident, other, jax.random.key(7))
    assert float(logs_a["loss"][0]) == pytest.approx(float(logs_b["loss"][0]), abs=1e-6)


def test_training_without_augmentation_sees_what_evaluation_sees():
    fields = ("train.augment=none", "data.resize=40,48", "data.image_size=32,32")
    config = config_lib.load("configs/folder.py", [*fields, "data.interpolation=lanczos"])
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    canvas = np.zeros((64, 80, 3), np.uint8)
    canvas[:60, :70] = image
    got = jax.jit(augment.make_augment(config, "none"))(
        jax.random.key(0), canvas, np.array([60, 70])
    )
    want = geometry.view_image(image, (40, 48), (32, 32), "lanczos")
    assert np.abs(255 * got - want.astype(float)).max() < 1.01


def test_a_teacher_laid_out_for_a_gpu_trains_the_same(config):
    config = config.copy_and_resolve_references()
    config.train.compute_dtype = "bfloat16"
    found = []
    for lies in (lambda tree: tree, lambda tree: placement.lay_out(tree, "bfloat16", True)):
        mesh, step, current, frozen, resident = setup(config, 1)
        chunk = mesh_lib.put_batch(rows(0, 2), mesh, axis=1)
        found.append(step(current, lies(frozen), resident, chunk, jax.random.key(7)))
    before, after = (jax.tree.leaves(jax.device_get(one)) for one in found)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
