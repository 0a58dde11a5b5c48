"""Checkpoints: bitwise, verified, and a damaged one costs no more than the way since the last."""

import json
import logging as std_logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from mmrjax.runtime import checkpoint, mesh

# Orbax leaves coroutines of failed reads behind, which pytest reports at some later time.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def replicated():
    return mesh.replicated(mesh.make_mesh(2))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def log(caplog):
    """The log lines; absl does not pass it on by itself."""
    logger = logging.get_absl_logger()
    logger.addHandler(caplog.handler)
    with caplog.at_level(std_logging.INFO, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def make_state(seed: int, width: int = 64) -> dict:
    """A training state with every kind of leaf: scalar, weights, moments, tables."""
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {"kernel": jnp.asarray(rng.normal(size=(300, width)), jnp.float32)},
        "bias": jnp.asarray(rng.normal(size=width), jnp.float32),
    }
    variables = {"params": params, "positions": {"table": jnp.full((5, 3), float(seed))}}
    moments = jax.tree.map(lambda x: x + seed, params)
    return {"step": jnp.asarray(seed, jnp.int32), **variables, "opt_state": {"mu": moments}}


def save(folder, *seeds: int, keep: int = 2) -> None:
    with checkpoint.Checkpoints(folder, keep) as checkpoints:
        for seed in seeds:
            checkpoints.save(seed, make_state(seed))


def restore(folder, target=None):
    with checkpoint.Checkpoints(folder) as checkpoints:
        return checkpoints.restore(make_state(0) if target is None else target)


def assert_bitwise_equal(got, expected) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def metadata_file(step):
    return next(p for p in (step / "meta").rglob("*") if b"checksums" in p.read_bytes())


def change_metadata(step, change):
    """With a checksum of their own that fits."""
    meta = json.loads(metadata_file(step).read_text())
    del meta["crc"]
    change(meta)
    meta["crc"] = checkpoint._crc(meta)
    metadata_file(step).write_text(json.dumps(meta))


# --- whole checkpoints


def test_state_comes_back_bit_for_bit(folder):
    save(folder, 7)
    step, restored = restore(folder)
    assert step == 7
    assert_bitwise_equal(restored, make_state(7))


def test_odd_values_come_back_bit_for_bit(folder):
    tree = {
        "bf16": jnp.asarray([1.5, -0.0, 3e38], jnp.bfloat16),
        "nan": jnp.asarray([np.nan, -np.nan, np.inf, -0.0, 1e-45], jnp.float32),
        "scalar": jnp.asarray(3),
        "flags": jnp.asarray([True, False]),
        "bytes": jnp.arange(256, dtype=jnp.uint8),
    }
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(0, tree)
        checkpoints.wait()
        _, restored = checkpoints.restore(tree)
    assert_bitwise_equal(restored, tree)


def test_empty_directory_has_nothing_to_restore(folder, replicated):
    assert restore(folder) is None
    assert restore(folder, replicated) is None
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == []


def test_the_newest_is_restored_and_the_latest_two_are_kept(folder):
    save(folder, 1, 2, 3, 10)
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [3, 10]
    step, restored = restore(folder)
    assert step == 10
    assert_bitwise_equal(restored, make_state(10))


def test_keep_says_how_many_stay(folder):
    save(folder, 1, 2, 3, 4, keep=3)
    with checkpoint.Checkpoints(folder, 3) as checkpoints:
        assert checkpoints.steps() == [2, 3, 4]


def test_state_may_be_donated_as_soon_as_save_returns(folder, replicated):
    expected = jax.tree.map(np.array, make_state(5))
    current = jax.device_put(make_state(5), replicated)
    train_step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 9, s), donate_argnums=0)
    # That the step donates is shown on a state that nobody is copying: while a save still reads a
    # buffer, JAX may keep it, and the load of the machine would decide the test.
    other = jax.device_put(make_state(5), replicated)
    train_step(other)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(other))
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(5, current)
        for _ in range(3):
            current = train_step(current)
        checkpoints.wait()
        _, restored = checkpoints.restore(current)
    assert_bitwise_equal(jax.tree.map(np.asarray, restored), expected)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_training_goes_on_while_checksums_are_taken_and_nothing_is_committed_before(
    folder, monkeypatch, fsdp
):
    monkeypatch.setattr(mesh, "FSDP_ELEMENTS", 1)
    devices = mesh.make_mesh(2, fsdp=fsdp)
    where = mesh.fsdp_shardings(make_state(5), devices)
    train_step = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0 + 9, s), donate_argnums=0, out_shardings=where
    )
    caller, released, checksum = threading.current_thread(), threading.Event(), checkpoint._checksum

    def held(array):
        assert threading.current_thread() is not caller
        assert released.wait(30)  # a save that waits for this ends in an error
        return checksum(array)

    with checkpoint.Checkpoints(folder) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_checksum", held)
            current = mesh.put(make_state(5), where)
            checkpoints.save(5, current)
            for _ in range(3):
                current = jax.block_until_ready(train_step(current))
            assert not (folder / "5").exists()
            released.set()
            checkpoints.wait()
        step, restored = checkpoints.restore(current)
    assert step == 5
    assert_bitwise_equal(restored, make_state(5))


def test_error_of_the_background_is_raised_by_the_next_call_and_costs_no_other_save(
    folder, monkeypatch
):
    def broken(array):
        raise OSError("no space of any kind")

    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(3, make_state(3))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_checksum", broken)
            checkpoints.save(5, make_state(5))
            with pytest.raises(OSError, match="no space of any kind"):
                checkpoints.save(8, make_state(8))
        assert checkpoints.restore(make_state(0))[0] == 3
        checkpoints.save(8, make_state(8))
        checkpoints.wait()
        assert checkpoints.restore(make_state(0))[0] == 8


def test_restored_arrays_lie_where_the_target_says(folder, replicated):
    save(folder, 3)
    target = jax.device_put(make_state(0), replicated)
    _, restored = restore(folder, target)
    for leaf in jax.tree.leaves(restored):
        assert leaf.sharding.is_equivalent_to(replicated, leaf.ndim)
    assert_bitwise_equal(restored, make_state(3))


def test_sharding_alone_restores_whatever_nested_dict_is_stored(folder, replicated):
    tree = {
        "memory": {"bank": jnp.arange(12.0).reshape(4, 3), "count": jnp.asarray(4, jnp.int32)},
        "mean map": jnp.full((2, 2), 0.5),
    }
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(0, tree)
        checkpoints.wait()
        step, restored = checkpoints.restore(replicated)
    assert step == 0
    assert_bitwise_equal(restored, tree)
    for leaf in jax.tree.leaves(restored):
        assert leaf.sharding.is_equivalent_to(replicated, leaf.ndim)


def test_the_same_step_twice_is_refused(folder):
    save(folder, 1)
    with checkpoint.Checkpoints(folder) as checkpoints:
        with pytest.raises((RuntimeError, ValueError), match="already exists"):
            checkpoints.save(1, make_state(1))


# --- damaged checkpoints


@pytest.mark.parametrize("damage", [flip_bit, truncate, remove])
def test_damaged_newest_checkpoint_is_reported_and_the_previous_one_used(folder, log, damage):
    save(folder, 3, 8)
    damage(largest_file(folder / "8"))
    step, restored = restore(folder)
    assert step == 3
    assert_bitwise_equal(restored, make_state(3))
    errors = [r.getMessage() for r in log.records if r.levelno == std_logging.ERROR]
    assert [e for e in errors if e.startswith("checkpoint 8 ") and e.endswith("ignored")]


def test_flipped_bit_that_the_storage_does_not_notice_is_found_by_the_checksum(folder, log):
    save(folder, 3, 8)

    def flip(meta):
        assert meta["checksums"] == checkpoint.checksums(make_state(8))
        meta["checksums"]["['params']['bias']"] ^= 1

    change_metadata(folder / "8", flip)
    assert restore(folder)[0] == 3
    assert any("checksum of [\"['params']['bias']\"]" in r.getMessage() for r in log.records)


def test_flipped_bit_in_the_metadata_is_damage_and_not_another_model(folder):
    save(folder, 3, 8)
    path = metadata_file(folder / "8")
    whole = path.read_bytes()
    for place in range(5, len(whole), len(whole) // 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
            step, restored = checkpoints.restore(make_state(0))
        assert step == 3, whole[place - 5 : place + 5]
    assert_bitwise_equal(restored, make_state(3))


@pytest.mark.parametrize("damage", [truncate, remove])
def test_checkpoint_whose_metadata_are_lost_is_passed_over(folder, damage):
    save(folder, 3, 8)
    for path in (folder / "8" / "meta").rglob("*"):
        if path.is_file():
            damage(path)
    assert restore(folder)[0] == 3


@pytest.mark.parametrize("damage", [flip_bit, truncate])
def test_no_intact_checkpoint_is_an_error_that_says_what_to_delete(folder, damage):
    save(folder, 3, 8)
    for step in ("3", "8"):
        damage(largest_file(folder / step))
    wanted = rf"none of the checkpoints \[8, 3\] in {folder} can be read; delete that folder"
    with pytest.raises(RuntimeError, match=wanted):
        restore(folder)


def test_damage_is_found_when_a_sharding_alone_is_given(folder, replicated):
    bank = jnp.asarray(np.random.default_rng(0).normal(size=(200, 30)), jnp.float32)
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(0, {"memory": {"bank": bank}})
    flip_bit(largest_file(folder / "0"))
    with pytest.raises(RuntimeError, match="none of the checkpoints"):
        restore(folder, replicated)


def test_remains_of_a_killed_save_are_not_taken_for_a_checkpoint(folder):
    save(folder, 3)
    remains = folder / "9.orbax-checkpoint-tmp-1"
    remains.mkdir()
    (remains / "half").write_bytes(b"?")
    assert restore(folder)[0] == 3


def test_run_resumed_from_the_previous_checkpoint_can_save_the_damaged_step_again(folder):
    save(folder, 3, 8)
    flip_bit(largest_file(folder / "8"))
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 3
        checkpoints.save(8, make_state(8))
        checkpoints.wait()
    assert restore(folder)[0] == 8


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoint_does_not_push_out_the_intact_ones_saved_after_it(folder, keep):
    save(folder, 3, 8)
    flip_bit(largest_file(folder / "8"))
    with checkpoint.Checkpoints(folder, keep) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 3
        for seed in (5, 6, 7):
            checkpoints.save(seed, make_state(seed))
            checkpoints.wait()
            assert checkpoints.restore(make_state(0))[0] == seed
        assert checkpoints.steps() == [5, 6, 7][-keep:]


# --- other models


def test_checkpoint_of_another_shape_names_leaves_with_both_shapes(folder):
    save(folder, 3)
    wanted = r"checkpoints/3 belongs to another model: .*kernel'\]: stored \[\[300, 64\], 'float32'"
    with pytest.raises(ValueError, match=wanted + r"\], expected \[\[300, 32\], 'float32'\]"):
        restore(folder, make_state(0, width=32))


def test_missing_and_additional_leaves_are_named(folder):
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(2), "b": jnp.zeros(2)})
        checkpoints.wait()
        with pytest.raises(ValueError, match="belongs to another model") as caught:
            checkpoints.restore({"a": jnp.zeros(2), "c": jnp.zeros(3)})
    assert "['b']: stored [[2], 'float32'], expected nothing" in str(caught.value)
    assert "['c']: stored nothing, expected [[3], 'float32']" in str(caught.value)


def test_another_dtype_is_another_model(folder):
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(2)})
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"stored \[\[2\], 'float32'\], expected .*'int32'"):
            checkpoints.restore({"a": jnp.zeros(2, jnp.int32)})


# --- checksums


def test_checksum_changes_with_any_bit_and_names_its_leaf():
    tree = {"a": {"b": np.zeros((3, 4), np.float32)}, "c": np.arange(5)}
    before = checkpoint.checksums(tree)
    assert before.keys() == {"['a']['b']", "['c']"}
    tree["a"]["b"].view(np.uint8)[2, 7] ^= 1
    after = checkpoint.checksums(tree)
    assert after["['a']['b']"] != before["['a']['b']"]
    assert after["['c']"] == before["['c']"]


def test_checksum_does_not_depend_on_where_the_array_lies(replicated):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    values = [
        checkpoint.checksums({"x": x})
        for x in (array, np.asfortranarray(array), jax.device_put(array, replicated))
    ]
    assert values[0] == values[1] == values[2]
