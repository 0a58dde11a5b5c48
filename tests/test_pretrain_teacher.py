"""The pretraining of the embedded teacher: what it draws, what it minimises, what it writes."""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmrjax import weights
from mmrjax.models import backbones, resnet
from mmrjax.weights import storage

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def script():
    """The script as a module; scripts/ is on the path only for this file."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("pretrain_teacher")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def procedural(script):
    return {name: importlib.import_module(f"procedural.{name}") for name in _MODULES}


_MODULES = ("objective", "scenes", "stream", "textures")


@pytest.fixture(scope="module")
def sheets(procedural):
    """One sheet of each family."""
    textures = procedural["textures"]
    return np.stack([textures.sheet(0, i) for i in range(len(textures.FAMILIES))])


# --- pictures


def test_every_texture_uses_the_grey_range_and_depends_on_seed_and_label_alone(procedural, sheets):
    for label, sheet in enumerate(sheets):
        assert (sheet.dtype, sheet.shape) == (np.uint8, (256, 256))
        assert sheet.std() > 8, label
        assert sheet.min() == 0, label
        assert sheet.max() == 255, label
    textures = procedural["textures"]
    np.testing.assert_array_equal(textures.sheet(0, 3), sheets[3])
    assert not np.array_equal(textures.sheet(1, 3), sheets[3])
    assert not np.array_equal(textures.sheet(0, 3 + len(textures.FAMILIES)), sheets[3])


def test_views_show_one_design_and_damage_is_where_it_says(procedural, sheets):
    scenes = procedural["scenes"]
    inside, kinds = [], set()
    for i in range(40):
        images, damage = scenes.episode(np.random.default_rng([0, i]), sheets, views=2)
        assert images.shape == (2, scenes.SIZE, scenes.SIZE, 3)
        assert images.dtype == damage.dtype == np.uint8
        inside.append((damage > 0).mean())
        kinds |= set(np.unique(damage)) - {0}
    assert 0.005 < np.mean(inside) < 0.1
    assert kinds == set(range(1, 1 + len(scenes.DAMAGE)))


def test_each_kind_of_damage_changes_what_it_marks_and_little_else(procedural, sheets):
    scenes = procedural["scenes"]
    ramp = np.linspace(40, 200, scenes.SIZE, dtype=np.float32)
    part = np.broadcast_to(ramp[:, None, None], (scenes.SIZE, scenes.SIZE, 3)).copy()
    part += 20 * np.sin(np.arange(scenes.SIZE) / 2)[:, None].astype(np.float32)
    for kind in scenes.DAMAGE:
        found = False
        for seed in range(12):
            after, seen = scenes.damaged(np.random.default_rng(seed), part, kind, sheets)
            change = np.abs(after - part).max(-1)
            assert change[~seen].max() <= scenes._SEEN, kind
            assert seen.mean() < 0.6, kind
            found |= seen.any()
        assert found, kind


def test_batches_are_the_same_from_any_start(procedural):
    draw = procedural["stream"].batches
    options = {"seed": 5, "classes": 13, "episodes": 2, "views": 2, "workers": 1}
    whole = list(draw(start=0, stop=3, **options))
    rest = list(draw(start=2, stop=3, **options))
    assert len(whole) == 3
    for got, want in zip(rest[0], whole[2], strict=True):
        np.testing.assert_array_equal(got, want)
    assert not np.array_equal(whole[0][0], whole[1][0])


# --- objective


def test_nearest_distance_equals_a_plain_search(procedural):
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    labels = rng.integers(-1, 2, (2, 3, 5))
    labels[:, :, 0] = 0  # every view has a clean cell
    got = procedural["objective"].nearest_distance(jnp.asarray(cells), jnp.asarray(labels))
    for e, v, n in np.ndindex(2, 3, 5):
        others = [
            np.mean((cells[e, v, n] - cells[e, u, m]) ** 2)
            for u in range(3)
            for m in range(5)
            if u != v and labels[e, u, m] == 0
        ]
        assert got[e, v, n] == pytest.approx(np.sqrt(min(others) + 1e-4), rel=1e-5)


def test_cell_labels_leave_out_what_lies_beside_damage(procedural):
    damage = np.zeros((1, 1, 24, 24), np.uint8)
    damage[0, 0, 9:11, 9:11] = 3
    labels = procedural["objective"].cell_labels(jnp.asarray(damage), layer=1).reshape(6, 6)
    expected = np.zeros((6, 6), int)
    expected[1:4, 1:4] = -1
    expected[2, 2] = 1
    np.testing.assert_array_equal(labels, expected)


def test_loss_falls_when_damaged_cells_move_away(procedural):
    objective = procedural["objective"]
    damage = np.zeros((1, 2, 32, 32), np.uint8)
    damage[0, 0, :16, :16] = 1
    rng = np.random.default_rng(0)

    def features(away):
        maps = {}
        for layer, stride in objective.LAYER_STRIDE.items():
            n = 32 // stride
            maps[layer] = rng.normal(0, 0.05, (2, n, n, 8)).astype(np.float32)
            maps[layer][0, : n // 2, : n // 2] += away
        return maps

    key, first = jax.random.key(0), jnp.array(objective.FIRST_SCALE)
    scales = dict.fromkeys(objective.TERMS, first)
    loss = jax.jit(objective.loss)
    near, _ = loss(features(0.0), scales, jnp.asarray(damage), key)
    far, terms = loss(features(3.0), scales, jnp.asarray(damage), key)
    assert float(far) < 0.5 * float(near)
    assert set(terms) == set(objective.TERMS)


# --- the network and the file


def test_folded_network_equals_the_trained_one(script):
    arch = resnet.Architecture((1, 1, 1), bottleneck=False, stem=4, widths=(4, 8, 12))
    network = script.NormalisedResNet(arch)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: rng.uniform(0.3, 0.6, x.shape).astype(np.float32), shapes)
    for name, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if name[-1].key == "kernel":
            leaf -= np.float32(0.45)
    want = jax.jit(functools.partial(network.apply, train=False))(variables, images)
    half = script.folded(variables["params"], variables["batch_stats"], arch)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"float16"}
    whole = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), half)
    got = jax.jit(resnet.ResNet(arch).apply)(whole, images)
    for layer, feature in got.items():
        np.testing.assert_allclose(feature, want[layer], atol=0.02, rtol=0.02)


def test_embedded_teacher_sees_damage_that_a_random_one_misses(procedural, sheets):
    scenes, objective = procedural["scenes"], procedural["objective"]
    episodes = [scenes.episode(np.random.default_rng([9, i]), sheets, 3) for i in range(6)]
    images, damage = (np.stack(part) for part in zip(*episodes, strict=True))
    labels = objective.cell_labels(jnp.asarray(damage), layer=2)
    network = resnet.ResNet(backbones.architecture("fdsl18"), layers=(2,))
    flat = jnp.asarray(images.reshape(-1, *images.shape[2:]) / 255.0)
    flat = backbones.build("fdsl18").normalise(flat)

    @jax.jit
    def distances(variables):
        cells = network.apply(variables, flat)[2]
        return objective.nearest_distance(cells.reshape(*labels.shape, -1), labels)

    kept = np.asarray(labels) >= 0
    truth = np.asarray(labels)[kept] == 1
    trained, random = (
        roc_auc_score(truth, np.asarray(distances(weights.load_teacher("fdsl18", word)[0]))[kept])
        for word in ("embedded", "random")
    )
    assert trained > 0.8
    assert trained > random + 0.05


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """Runs the script for two steps of a tiny network, or until `stop`; the path it writes."""
    arch = resnet.Architecture((1, 1, 1), bottleneck=False, stem=4, widths=(4, 8, 8))
    monkeypatch.setitem(resnet.ARCHITECTURES, script.NAME, arch)

    def call(name: str, stop: int = 2) -> pathlib.Path:
        path = tmp_path / name
        args = ["--steps=2", "--episodes=1", "--views=2", "--classes=13", "--workers=1"]
        monkeypatch.setattr(sys, "argv", ["x", f"--output={path}", f"--stop={stop}", *args])
        script.main()
        return path

    return call


def test_script_writes_a_teacher_that_loads(script, run):
    path = run("teacher.safetensors")
    variables, facts = weights.load_teacher(script.NAME, str(path))
    assert np.isfinite(np.concatenate([x.ravel() for x in jax.tree.leaves(variables)])).all()
    assert facts["licence"].startswith("Apache-2.0")
    assert not facts["random"]


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(run):
    whole, _ = storage.read(run("whole.safetensors"))
    assert not run("parts.safetensors", stop=1).exists()
    parts, _ = storage.read(run("parts.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
