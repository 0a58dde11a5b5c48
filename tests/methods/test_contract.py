"""Every method keeps the contract of methods/base.py; so do toys for what no real method covers."""

import ast
import pathlib

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from mmrjax import methods
from mmrjax.data import epochs
from mmrjax.data.defects import rows as defect_rows
from mmrjax.data.defects import synthesise
from mmrjax.data.records import Records
from mmrjax.methods import base, optim
from mmrjax.runtime import checkpoint
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import begun, loop
from mmrjax.train import step as step_lib

PACKAGE = pathlib.Path(methods.__file__).parents[1]


def make_records(count: int, categories: int = 1) -> Records:
    """Good pictures of 64 x 64 px, each of one random colour with some grain."""
    rng, source = np.random.default_rng(1), []
    for _ in range(count):
        image = np.clip(rng.integers(60, 190, 3) + rng.normal(0, 6, (64, 64, 3)), 0, 255)
        png = cv2.imencode(".png", image.astype(np.uint8))[1].tobytes()
        source.append({"image": png, "mask": cv2.imencode(".png", np.zeros((64, 64)))[1].tobytes()})
    ids = np.array([f"{i:03d}" for i in range(count)])
    empty = np.full(count, "")
    table = {"id": ids, "group": ids, "domain": empty, "defect": empty}
    table |= {"label": np.zeros(count, int), "has_mask": np.zeros(count, bool)}
    table["part"] = np.array([f"toy/{i % categories}" for i in range(count)])
    return Records(
        "toy", "all", table, "digest", {"train": source}, [("train", i) for i in range(count)]
    )


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    return jnp.asarray(pixels) / 255.0


@pytest.fixture(scope="module", params=sorted(methods.METHODS))
def fitted(request, tiny_config, images):
    method = methods.create(request.param, tiny_config)
    frozen, facts = method.load_frozen()
    variables, _ = method.init(jax.random.key(0), frozen)
    if method.fit is not None:
        variables = method.fit(variables, frozen, [(images, 8), (images, 5)], 13, jax.random.key(1))
    return method, variables, frozen, facts


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_a_method_takes_a_teacher_of_another_family(name, tiny_config, images):
    config = tiny_config.copy_and_resolve_references()
    config.teacher.name = "efficientnet_lite0"
    method = methods.create(name, config)
    frozen, _ = method.load_frozen()
    if method.fit is not None:
        variables, _ = method.init(jax.random.key(0), frozen)
        variables = method.fit(variables, frozen, [(images, 8)], 8, jax.random.key(1))
    else:
        variables = jax.eval_shape(lambda key: method.init(key, frozen)[0], jax.random.key(0))
    result = jax.eval_shape(method.predict, variables, frozen, images)
    assert result["map"].shape == (8, 64, 64)


def test_prediction_and_score_have_the_promised_shapes_types_and_names(fitted, images):
    method, variables, frozen, _ = fitted
    result = jax.jit(method.predict)(variables, frozen, images)
    assert result["map"].shape == (8, 64, 64)
    assert result["map"].dtype == jnp.float32
    assert result["parts"]
    assert all(part.shape == (8, 64, 64) for part in result["parts"].values())
    assert np.isfinite(result["map"]).all()
    score = method.score(result["map"])
    assert score.shape == (8,)
    assert score.dtype == jnp.float32


def test_leaving_no_image_out_is_the_prediction(fitted, images):
    method, variables, frozen, _ = fitted
    if method.leave_out is None:
        assert not method.leaves_out_exactly(method.config)
        return
    away = jnp.zeros((8, 13), bool)  # of the thirteen that `fit` has seen
    found = jax.jit(method.leave_out)(variables, frozen, images, away)
    want = jax.jit(method.predict)(variables, frozen, images)
    assert set(found) == set(want)
    np.testing.assert_allclose(found["map"], want["map"], rtol=1e-4, atol=1e-4)


def test_a_score_does_not_depend_on_the_rest_of_the_batch(fitted, images):
    method, variables, frozen, _ = fitted
    predict = jax.jit(method.predict)
    alone, together = (predict(variables, frozen, x)["map"] for x in (images[2:3], images))
    # PatchCore subtracts squared norms above 13 down to 0.024: one rounding is 2e-5 of the score.
    np.testing.assert_allclose(alone[0], together[2], rtol=1e-4, atol=1e-5)
    scores = method.score(alone)[0], method.score(together)[2]
    np.testing.assert_allclose(*scores, rtol=1e-4)


def test_loss_is_a_scalar_and_its_gradient_reaches_every_parameter(fitted, images):
    method, variables, frozen, _ = fitted
    records = make_records(16)
    stages = method.stages(records)
    assert tuple(stage.name for stage in stages) == method.stage_names
    if not stages:
        assert variables["params"] == {}
        return
    extras, _ = method.extras(records, records.take([]))
    trained = [
        slopes_of(method, stage, variables, {**frozen, **extras}, images) for stage in stages
    ]
    paths = set(traverse_util.flatten_dict(variables["params"], sep="/"))
    assert set().union(*trained) == paths


def slopes_of(method, stage, variables, frozen, images) -> set[str]:
    """The parameters that a stage trains; each of them gets a gradient."""
    batch = {
        "image": images,
        "weight": jnp.ones(8),
        "keys": jax.random.split(jax.random.key(0), 8),
    }
    progress = {"step": jnp.int32(0), "epoch": jnp.int32(0)}
    state = step_lib.create(variables, stage)

    @jax.jit
    def once(state, frozen, batch):
        if stage.plan.defects is not None:  # as the step does
            batch = defect_rows.with_defects(stage.plan.defects, batch, frozen)
        key = jax.random.key(3)
        if stage.update is not None:
            changed, logs = stage.update(state, frozen, batch, key, progress, stage.tx)
            moments = {name: own[0].mu for name, own in changed.opt_state.items()}
            return moments, changed.collections, logs

        def loss(params):
            everything = {**state.collections, "params": step_lib.merged(params, state.fixed)}
            return method.loss(stage.name, everything, frozen, batch, key, progress)

        (value, (collections, logs)), slope = jax.value_and_grad(loss, has_aux=True)(state.params)
        return slope, collections, {**logs, "loss": value}

    gradients, collections, logs = once(state, frozen, batch)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    assert all(leaf.shape == () for leaf in jax.tree.leaves(logs))
    assert set(collections) <= set(variables)
    return set(traverse_util.flatten_dict(gradients, sep="/"))


def test_facts_name_the_teacher_and_say_that_it_is_random(fitted):
    if "teacher" not in fitted[2]:
        assert "teacher" not in fitted[3]
        return
    teacher = fitted[3]["teacher"]
    assert teacher["name"] == "resnet18"
    assert teacher["random"] is True


def test_unknown_method_lists_the_known(tiny_config):
    with pytest.raises(ValueError, match=r"unknown method 'mmmr'; available: .*patchcore"):
        methods.create("mmmr", tiny_config)


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_a_method_owns_its_title_its_fields_and_its_rules(name, tiny_config):
    kind = methods.METHODS[name]
    assert kind.title
    flat = config_lib.flatten(tiny_config)
    for group, fields in kind.defaults().items():
        assert {f"{group}.{field}" for field in fields} <= flat.keys()
    assert kind.groups() <= {field.split(".")[0] for field in flat}
    for prefix in kind.free:
        assert any(field.startswith(prefix) for field in flat), prefix
    kind.check(tiny_config)


def method_names_outside(package: pathlib.Path) -> list[str]:
    """String literals and attributes equal to a method's name where only methods may know it."""
    rooms = ("methods", "models", "weights")
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] in rooms:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modes = {
            id(part)
            for node in ast.walk(tree)
            if "mode" in ast.dump(node).lower()
            and isinstance(node, ast.Compare | ast.Dict | ast.Assign)
            for part in ast.walk(node)
            if isinstance(part, ast.Constant) and part.value == "mmr"
        }
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and node.value in methods.METHODS
            is_attribute = isinstance(node, ast.Attribute) and node.attr in methods.METHODS
            if (is_text and id(node) not in modes) or is_attribute:
                found.append(f"{path.relative_to(package)}:{node.lineno}")
    return found


def test_only_methods_models_and_weights_know_a_method_by_name():
    """The metric mode "mmr" is the name of a mode, where `mode` stands beside it."""
    assert method_names_outside(PACKAGE) == []


def test_a_method_name_in_another_room_is_found(tmp_path):
    (tmp_path / "report").mkdir()
    code = 'a = name == "patchcore"\nb = config.aminet.width\nc = mode == "mmr"\n'
    (tmp_path / "report" / "x.py").write_text(code)
    assert method_names_outside(tmp_path) == ["report/x.py:1", "report/x.py:2"]


class Toy(base.Method):
    """No teacher; the shared parts of the toys below."""

    name, title, stage_names = "toy", "Toy", ("train",)

    def load_frozen(self):
        return {}, {}

    def stages(self, records):
        plan = epochs.Plan(8)
        return [base.Stage("train", 1, plan, optax.sgd(0.1), augment="none")]

    def predict(self, variables, frozen, images):
        return {"map": images.mean(axis=-1), "parts": {}}


class TwoStageToy(Toy):
    """An encoder and a decoder are trained, then the decoder alone, by another optimiser."""

    stage_names = ("both", "decoder")
    still_seen: list

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="decoder")(nn.tanh(nn.Dense(4, name="encoder")(x)))

    net = Net()

    def init(self, key, frozen):
        return dict(self.net.init(key, jnp.zeros((1, 64, 64, 3)))), {}

    def stages(self, records):
        plan = epochs.Plan(8)
        first = base.Stage("both", 2, plan, optax.adam(1e-2), augment="none")
        second = first._replace(
            name="decoder", tx=optax.sgd(0.1), trained=lambda path: path.startswith("decoder/")
        )
        return [first, second]

    def loss(self, stage, variables, frozen, batch, key, progress):
        out = self.net.apply({"params": variables["params"]}, batch["image"])
        target = batch["image"] if stage == "both" else 1 - batch["image"]
        per_image = jnp.mean((out - target) ** 2, axis=(1, 2, 3))
        loss = jnp.sum(per_image * batch["weight"]) / batch["weight"].sum()
        return loss, ({}, {"second": jnp.float32(stage == "decoder")})


def run_toy(kind, config, folder, count=19, seed=0):
    with config.unlocked():
        return loop.train(kind(config), make_records(count), seed, folder)


def params_of(folder, stage):
    with checkpoint.Checkpoints(folder / "checkpoints" / stage, read_only=True) as saved:
        step, tree = saved.restore(mesh_lib.replicated(mesh_lib.make_mesh(1)))
    return step, step_lib.variables_of(tree)["params"], tree


def test_a_second_stage_trains_its_own_part_and_leaves_the_rest_bit_for_bit(tiny_config, tmp_path):
    trained = run_toy(TwoStageToy, tiny_config, tmp_path)
    assert checkpoint.Store(tmp_path).stages(begun.CHECKPOINTS) == ["both", "decoder"]
    first_step, first, _ = params_of(tmp_path, "both")
    second_step, second, tree = params_of(tmp_path, "decoder")
    assert first_step == second_step == 6  # of each stage: optimiser and step begin anew
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(first["encoder"][name], second["encoder"][name])
        assert not np.array_equal(first["decoder"][name], second["decoder"][name])
    assert set(tree["params"]) == {"decoder"}
    assert "encoder" not in str(jax.tree_util.tree_structure(tree.get("opt_state", {})))
    final = jax.device_get(trained.variables["params"])
    np.testing.assert_array_equal(final["decoder"]["kernel"], second["decoder"]["kernel"])
    lines = (tmp_path / loop.LOG).read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f'{{"step": {i}' for i in range(12)]


def test_the_gradient_of_a_frozen_part_is_not_computed(tiny_config):
    method = TwoStageToy(tiny_config)
    variables, _ = method.init(jax.random.key(0), {})
    stage = method.stages(make_records(8))[1]
    state = step_lib.create(variables, stage)
    assert set(state.params) == {"decoder"}
    assert set(state.fixed) == {"encoder"}
    assert state.variables["params"].keys() == variables["params"].keys()


def test_a_finished_stage_is_restored_and_not_repeated(tiny_config, tmp_path, monkeypatch):
    whole = run_toy(TwoStageToy, tiny_config, tmp_path / "whole")
    begun_at, made = [], step_lib.make_train_step

    def fail_in_the_second(method, stage, *rest):
        begun_at.append(stage.name)
        if stage.name == "decoder" and len(begun_at) == 2:
            raise KeyboardInterrupt
        return made(method, stage, *rest)

    monkeypatch.setattr(step_lib, "make_train_step", fail_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_toy(TwoStageToy, tiny_config, tmp_path / "killed")
    resumed = run_toy(TwoStageToy, tiny_config, tmp_path / "killed")
    assert begun_at == ["both", "decoder", "decoder"]
    for a, b in zip(
        jax.tree.leaves(whole.variables), jax.tree.leaves(resumed.variables), strict=True
    ):
        np.testing.assert_array_equal(a, b)


class BatchNormToy(Toy):
    """Statistics travel in a collection and must see no padding row."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)

    net = Net()

    def init(self, key, frozen):
        return dict(self.net.init(key, jnp.zeros((1, 64, 64, 3)), False)), {}

    def stages(self, records):
        plan = epochs.Plan(8, last_batch="drop")
        plan.check(len(records))
        return [base.Stage("train", 2, plan, optax.sgd(0.0), augment="none")]

    def loss(self, stage, variables, frozen, batch, key, progress):
        out, changed = self.net.apply(variables, batch["image"], True, mutable=["batch_stats"])
        return jnp.mean(out**3), (changed, {"epoch": progress["epoch"].astype(jnp.float32)})


def test_batch_norm_never_sees_a_padding_row(tiny_config, tmp_path):
    """An odd number of images: the statistics are those of full batches, computed by NumPy."""
    trained = run_toy(BatchNormToy, tiny_config, tmp_path, count=19)
    records, plan = make_records(19), epochs.Plan(8, last_batch="drop")
    mean = np.zeros(3)
    for epoch in range(2):
        table, weight = plan.table(19, 0, epoch)
        assert table.shape == (2, 8)
        assert weight.all()
        for row in table:
            batch = np.stack([records.image(i) for i in row]) / 255
            mean = 0.5 * mean + 0.5 * batch.mean(axis=(0, 1, 2))
    found = trained.variables["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(found, mean, atol=2e-3)  # half a grey level, of the view's resize


def test_too_few_images_for_a_full_batch_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"3 training images fill no batch of 8.*lower"):
        BatchNormToy(tiny_config).stages(make_records(3))


class TwoOptimiserToy(TwoStageToy):
    """A GAN: one optimiser after the other, the second on what the first has changed."""

    stage_names = ("train",)

    def stages(self, records):
        tx = {"encoder": optax.adam(1e-2), "decoder": optax.adam(1e-2)}
        return [base.Stage("train", 1, epochs.Plan(8), tx, augment="none", update=self.two_steps)]

    def two_steps(self, state, frozen, batch, key, progress, tx):
        def loss(params):
            return self.loss("both", {"params": params}, frozen, batch, key, progress)[0]

        value, slope = jax.value_and_grad(loss)(state.params)
        params, opt_state = optim.descend(
            tx, {"encoder": slope["encoder"]}, state.opt_state, state.params
        )
        seen = params["encoder"]["bias"]
        if self.config.train.epochs > 1:  # else the decoder idles
            slope = jax.grad(loss)(params)
            params, opt_state = optim.descend(tx, {"decoder": slope["decoder"]}, opt_state, params)
        logs = {"loss": value, "seen": jnp.sum(seen - state.params["encoder"]["bias"])}
        return state.replace(params=params, opt_state=opt_state), logs


def step_once(method, records):
    (stage,), mesh = method.stages(records), mesh_lib.make_mesh(2)
    variables, _ = method.init(jax.random.key(0), {})
    augment = lambda key, image, size: image / 255.0  # noqa: E731
    step = step_lib.make_train_step(method, stage, augment, 2, mesh)
    image = np.stack([records.image(i) for i in range(4)])
    resident = {"image": image, "size": np.full((4, 2), 64, np.int32)}
    chunk = {"index": np.int32([[0, 1, 2, 3]]), "weight": np.ones((1, 4), np.float32)}
    before = jax.device_get(step_lib.create(variables, stage))
    initial = mesh_lib.replicate(before, mesh)
    after, logs = step(initial, {}, resident, chunk, jax.random.key(0))
    return before, jax.device_get(after), logs


@pytest.mark.parametrize("epochs_", [1, 2])
def test_two_optimisers_step_in_sequence_and_an_idle_one_does_not_count(tiny_config, epochs_):
    config = tiny_config.copy_and_resolve_references()
    config.train.epochs = epochs_
    before, after, logs = step_once(TwoOptimiserToy(config), make_records(4))
    assert set(after.opt_state) == {"encoder", "decoder"}
    counts = {name: int(state[0].count) for name, state in after.opt_state.items()}
    assert counts == {"encoder": 1, "decoder": epochs_ - 1}
    assert abs(float(logs["seen"][0])) > 0  # the second step saw the first's new weights
    changed = {
        name: not np.array_equal(before.params[name]["bias"], after.params[name]["bias"])
        for name in ("encoder", "decoder")
    }
    assert changed == {"encoder": True, "decoder": epochs_ == 2}
    assert int(after.step) == 1


def test_an_optimiser_without_parameters_is_refused(tiny_config):
    method = TwoOptimiserToy(tiny_config)
    variables, _ = method.init(jax.random.key(0), {})
    (stage,) = method.stages(make_records(4))
    stage = stage._replace(tx={"critic": optax.sgd(0.1)})
    with pytest.raises(ValueError, match=r"\['critic'\] have no parameters; there are .*decoder"):
        step_lib.create(variables, stage)


class DefectToy(TwoStageToy):
    """Asks for defects of its own make and for a second picture of the category."""

    stage_names = ("train",)

    class Recipe(defect_rows.Recipe):
        def draw(self, rows, extras):
            mask = jnp.zeros(rows["image"].shape[:3], bool).at[:, 8:24, 8:24].set(True)
            images = jnp.where(mask[..., None], rows["second"], rows["image"])
            kind = jnp.zeros(len(mask), jnp.int32)
            return defect_rows.Drawn(images, rows["image"], mask, mask & False, kind)

    def stages(self, records):
        recipe = self.Recipe(2, second=True)
        category = np.unique(records.table["part"], return_inverse=True)[1]
        plan = epochs.Plan(8, defects=recipe, category=category)
        return [base.Stage("train", 1, plan, optax.sgd(0.0), augment="none")]

    def loss(self, stage, variables, frozen, batch, key, progress):
        changed = jnp.abs(batch["image"] - batch["normal"]).sum(axis=-1) > 0
        logs = {
            "inside": jnp.mean(batch["mask"][::2, 8:24, 8:24].astype(jnp.float32)),
            "outside": jnp.sum((changed & ~batch["mask"]).astype(jnp.float32)),
            "changed": jnp.mean(changed[::2, 8:24, 8:24].astype(jnp.float32)),
            "plain": jnp.sum(changed[1::2].astype(jnp.float32)),
            "drawn": jnp.sum((batch["kind"] != synthesise.NONE).astype(jnp.float32)),
        }
        return sum(jnp.sum(x) for x in jax.tree.leaves(variables["params"])), ({}, logs)


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_any_method_may_ask_for_defects_and_a_second_picture(tiny_config, tmp_path, mode):
    config = tiny_config.copy_and_resolve_references()
    config.data.feed = mode
    records = make_records(24, categories=3)
    loop.train(DefectToy(config), records, 0, tmp_path)
    lines = [eval(line) for line in (tmp_path / loop.LOG).read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert line["inside"] == 1
        assert line["changed"] > 0.99  # another picture's colour
        assert line["outside"] == line["plain"] == 0
        assert line["drawn"] == 4


def test_a_plan_shows_so_many_of_each_category_and_draws_anew(tiny_config):
    category = np.repeat([0, 1, 2], (9, 4, 2))
    plan = epochs.Plan(4, per_category=3, category=category)
    assert plan.shown(15) == 3 + 3 + 3
    assert plan.steps_per_epoch(15) == 3
    seen = set()
    for epoch in range(20):
        table, weight = plan.table(15, 7, epoch)
        real = table[weight > 0]
        assert len(set(real.tolist())) == 8  # a category of two shows one of them twice
        np.testing.assert_array_equal(np.bincount(category[real]), [3, 3, 3])
        seen |= set(real.tolist())
    assert seen == set(range(15))


def test_a_plan_may_show_the_same_images_in_every_epoch_in_another_order():
    category = np.repeat([0, 1], (9, 4))
    plan = epochs.Plan(4, per_category=3, same=True, category=category)
    tables = [plan.table(13, 7, epoch)[0].ravel()[:6] for epoch in range(5)]
    assert len({tuple(sorted(table)) for table in tables}) == 1
    assert len({tuple(table) for table in tables}) > 1
    assert set(plan.table(13, 8, 0)[0].ravel()) != set(tables[0])


@pytest.mark.parametrize("batch", [32, 7])
def test_exactly_64_of_80_images_of_each_category_get_a_defect_others_in_every_epoch(batch):
    category = np.repeat([0, 1, 2], (100, 60, 90))
    recipe = defect_rows.Recipe(1)
    plan = epochs.Plan(
        batch, per_category=80, same=True, category=category, defects=recipe, defective=0.8
    )
    seen = []
    for epoch in range(3):
        table, weight = plan.table(250, 5, epoch)
        chosen = plan.chosen(table, weight, 250, 5, epoch)
        assert not chosen[weight == 0].any()
        real = weight > 0
        np.testing.assert_array_equal(np.bincount(category[table[real]]), [80] * 3)
        np.testing.assert_array_equal(np.bincount(category[table[chosen]]), [64] * 3)
        seen.append(frozenset(table[chosen].tolist()))
        np.testing.assert_array_equal(chosen, plan.chosen(table, weight, 250, 5, epoch))
    assert len(set(seen)) == 3


def test_a_second_picture_is_another_of_the_same_category():
    category = np.repeat([0, 1, 2], (5, 3, 1))
    plan = epochs.Plan(4, defects=defect_rows.Recipe(2, second=True), category=category)
    table, _ = plan.table(9, 0, 0)
    other = plan.seconds(table, 9, 0, 0)
    np.testing.assert_array_equal(category[other], category[table])
    alone = category[table] == 2
    assert ((other == table) == alone).all()
    np.testing.assert_array_equal(other, plan.seconds(table, 9, 0, 0))
