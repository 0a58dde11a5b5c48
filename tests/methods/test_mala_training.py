"""Both stages of MALA in the loop: devices, resume, and an encoder that stays as it was."""

import cv2
import jax
import numpy as np
import pytest

from mmrjax import methods
from mmrjax.data import augment
from mmrjax.data.records import Records
from mmrjax.runtime import logs as logs_lib
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import loop
from mmrjax.train import step as step_lib


def make_records(count: int) -> Records:
    """Good pictures of 64 x 64 px in noise."""
    rng, source = np.random.default_rng(1), []
    for _ in range(count):
        image = rng.integers(60, 190, (64, 64, 3), dtype=np.uint8)
        png = cv2.imencode(".png", image)[1].tobytes()
        source.append({"image": png, "mask": cv2.imencode(".png", np.zeros((64, 64)))[1].tobytes()})
    ids, empty = np.array([f"{i:03d}" for i in range(count)]), np.full(count, "")
    table = {"id": ids, "group": ids, "domain": empty, "defect": empty}
    table |= {"label": np.zeros(count, int), "has_mask": np.zeros(count, bool)}
    rows = [("train", i) for i in range(count)]
    return Records("toy", "all", table, "digest", {"train": source}, rows)


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.ckpt.every_seconds = 0.0
    config.mala.images = (8, 8)
    config.mala.learning_rates = (1e-3, 1e-3)
    config.mala.schedule = "constant"
    return config


def two_steps(config, number: int, devices: int) -> tuple:
    """(losses of two steps of a stage on so many devices, state before, state after)."""
    method, records = methods.create("mala", config), make_records(16)
    stage, mesh = method.stages(records)[number], mesh_lib.make_mesh(devices)
    variables, _ = method.init(jax.random.key(0), {})
    extras, _ = method.extras(records, records.take([]))
    before = jax.device_get(step_lib.create(variables, stage))
    state = mesh_lib.replicate(before, mesh)
    view = augment.make_augment(config, "none")
    step = step_lib.make_train_step(method, stage, view, 1, mesh)
    images = np.stack([records.image(i) for i in range(16)])
    if stage.plan.foreground:
        images = np.concatenate([images, np.full_like(images[..., :1], 255)], axis=-1)
    resident = {"image": images, "size": np.full((16, 2), 64, np.int32)}
    found = []
    for epoch in range(2):
        index, weight = stage.plan.table(16, 0, epoch)
        chunk = {"index": index[:1], "weight": weight[:1]}
        if stage.plan.defective is not None:
            chunk["defective"] = stage.plan.chosen(index, weight, 16, 0, epoch)[:1]
        chunk = mesh_lib.put_batch(chunk, mesh, axis=1)
        data = mesh_lib.replicate(resident, mesh)
        state, logs = step(state, mesh_lib.replicate(extras, mesh), data, chunk, jax.random.key(3))
        found.append(np.asarray(logs["loss"])[0])
    return np.array(found), before, jax.device_get(state)


@pytest.mark.parametrize("number", [0, 1])
def test_devices_do_not_change_the_loss_and_a_frozen_encoder_stays_bit_for_bit(config, number):
    one, *_ = two_steps(config, number, 1)
    eight, before, after = two_steps(config, number, 8)
    np.testing.assert_allclose(one, eight, rtol=2e-5)
    is_trained = "encoder" in after.params["autoencoder"]
    assert is_trained == (number == 0)
    if not is_trained:
        assert "encoder" not in str(jax.tree.structure(after.opt_state)).replace("autoencoder", "")
        for a, b in zip(jax.tree.leaves(before.fixed), jax.tree.leaves(after.fixed), strict=True):
            np.testing.assert_array_equal(a, b)
        decoder = before.params["autoencoder"]["decoder"], after.params["autoencoder"]["decoder"]
        for a, b in zip(*map(jax.tree.leaves, decoder), strict=True):
            assert not np.array_equal(a, b)


@pytest.mark.slow
def test_killed_in_either_stage_and_resumed_equals_uninterrupted(config, tmp_path, monkeypatch):
    records = make_records(16)

    def train(folder):
        return loop.train(methods.create("mala", config), records, 5, tmp_path / folder)

    whole = train("whole")
    for stop in (2, 3):  # calls until the kill: in stage 1, then in stage 2
        calls, add = [], logs_lib.TrainLog.add

        def killed(self, *args, calls=calls, stop=stop, add=add):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return add(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(logs_lib.TrainLog, "add", killed)
            with pytest.raises(KeyboardInterrupt):
                train("killed")
    again = train("killed")
    for a, b in zip(
        jax.tree.leaves(whole.variables), jax.tree.leaves(again.variables), strict=True
    ):
        np.testing.assert_array_equal(a, b)
