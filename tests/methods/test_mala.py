"""MALA: which parameter which stage trains, its losses in closed form, its score, bad input."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from mmrjax import methods
from mmrjax.methods import adversarial, anomaly_map, mala, mala_fields, optim, ssim
from mmrjax.models import mala as networks
from mmrjax.runs import sweep
from mmrjax.runtime import config as config_lib
from mmrjax.train import step as step_lib


def configured(tiny_config, **fields):
    config = tiny_config.copy_and_resolve_references()
    with config.unlocked():
        config.mala.update(fields)
    return config


@pytest.fixture(scope="module")
def method(tiny_config):
    return methods.create("mala", tiny_config)


@pytest.fixture(scope="module")
def variables(method):
    return method.init(jax.random.key(0), {})[0]


def names(method, variables, stage):
    paths = traverse_util.flatten_dict(variables["params"], sep="/")
    return {path for path in paths if method.is_trained(stage, path)}


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_stage_1_trains_all_but_tbm_and_stage_2_decoder_and_tbm_alone(method, variables):
    first, second = (names(method, variables, stage) for stage in method.stage_names)
    assert {path.split("/")[0] for path in first} == {"autoencoder", "plpm"}
    assert "autoencoder/mask_token" in first
    assert all(path.startswith(("autoencoder/decoder/", "tbm/")) for path in second)
    assert not any("pixels" in path for path in second)


@pytest.mark.parametrize(
    ("fields", "trained"),
    [({}, 27_318_784), ({"tbm": "none"}, 26_007_552)],
)
def test_stage_2_trains_as_many_parameters_as_specified_at_full_size(tiny_config, fields, trained):
    """Nothing is allocated: the shapes alone are drawn."""
    config = configured(
        tiny_config,
        **{"size": "large", "width": 0, "depth": 0, "heads": 0, "plpm_base": 64},
        **{"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16, **fields},
    )
    config.data.image_size = (224, 224)
    large = methods.create("mala", config)
    shapes = jax.eval_shape(lambda key: large.init(key, {})[0], jax.random.key(0))
    flat = traverse_util.flatten_dict(shapes["params"], sep="/")
    assert sum(x.size for k, x in flat.items() if large.is_trained("localise", k)) == trained
    assert mala_fields.rate(large.options, 0) == 1e-3 * 8 / 256


def test_learning_rates_follow_the_papers_rule():
    options = mala_fields.defaults().mala
    assert mala_fields.rate(options, 0) == 5e-4
    assert mala_fields.rate(options, 1) == 1.25e-4
    options.learning_rates = (0.0, 1e-4)
    assert mala_fields.rate(options, 1) == 1e-4


def test_warm_up_is_linear_and_the_cosine_ends_at_zero():
    rate = optim.warm_cosine(5e-4, 0.02, 2000, 42)
    np.testing.assert_allclose(rate(0), 0)
    np.testing.assert_allclose(rate(20 * 42), 2.5e-4, rtol=1e-5)
    np.testing.assert_allclose(rate(40 * 42), 5e-4, rtol=1e-5)
    np.testing.assert_allclose(rate(1020 * 42), 2.5e-4, rtol=1e-5)
    np.testing.assert_allclose(rate(2000 * 42), 0, atol=1e-10)


class Judge:
    """A judge without parameters whose logits are all 0."""

    def apply(self, variables, images, mutable):
        return 0.0 * images.sum((1, 2, 3)) + variables["params"]["bias"], {"batch_stats": {}}


def one_update(options, judge, images, rate=0.1):
    painted = jnp.full_like(images, 0.25)
    state = step_lib.TrainState(
        jnp.int32(0),
        {"autoencoder": {"shift": jnp.float32(0)}, "plpm": {"bias": jnp.float32(0)}},
        {},
        {"batch_stats": {}},
        {},
    )
    tx = {name: optax.sgd(rate) for name in state.params}
    state = state.replace(opt_state=optim.start(tx, state.params))
    batch = {"image": images, "weight": jnp.ones(len(images))}
    paint = lambda params: painted + params["shift"]  # noqa: E731
    return adversarial.update(judge, options, paint, state, batch, tx)


@pytest.mark.parametrize("form", ["adversarial", "cooperative"])
def test_a_judge_that_knows_nothing_costs_ln_2(form):
    options = mala_fields.defaults().mala
    options.plpm = form
    images = jnp.full((2, 32, 32, 3), 0.75)
    state, logs = one_update(options, Judge(), images)
    np.testing.assert_allclose(logs["plpm"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(logs["judged"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(logs["l1"], 0.5, rtol=1e-6)
    expected = logs["l1"] + logs["ssim"] + 0.01 * logs["judged"]
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-6)
    assert state.params["autoencoder"]["shift"] > 0  # towards the brighter original
    np.testing.assert_allclose(state.params["plpm"]["bias"], 0, atol=1e-7)  # both labels balance


class BiasedJudge(Judge):
    """Calls bright images painted, by its own slope."""

    def apply(self, variables, images, mutable):
        slope = variables["params"]["bias"]
        return images.mean((1, 2, 3)) * slope, {"batch_stats": {}}


@pytest.mark.parametrize(("form", "sign"), [("adversarial", 1), ("cooperative", -1)])
def test_the_painter_goes_against_or_with_the_judge_after_its_step(form, sign):
    """The judge learns that dark images are painted; the painter brightens, or darkens."""
    options = mala_fields.defaults().mala
    options.plpm, options.paint_weights = form, (0.0, 0.0, 1.0)
    images = jnp.full((2, 32, 32, 3), 0.75)
    state, _ = one_update(options, BiasedJudge(), images, rate=1.0)
    assert state.params["plpm"]["bias"] < 0
    assert jnp.sign(state.params["autoencoder"]["shift"]) == sign


def test_without_a_judge_the_painter_learns_alone():
    options = mala_fields.defaults().mala
    _, logs = one_update(options, None, jnp.full((2, 32, 32, 3), 0.75))
    assert set(logs) == {"loss", "l1", "ssim"}


def test_the_painters_step_leaves_the_judges_statistics_alone():
    judge = networks.PseudoLabels(4)
    images = jax.random.uniform(jax.random.key(0), (4, 64, 64, 3))
    drawn = judge.init(jax.random.key(1), images)
    state = step_lib.TrainState(
        jnp.int32(0),
        {"autoencoder": {"shift": jnp.float32(0.1)}, "plpm": drawn["params"]},
        {},
        {"batch_stats": drawn["batch_stats"]},
        {},
    )
    tx = {name: optax.sgd(0.0) for name in state.params}
    state = state.replace(opt_state=optim.start(tx, state.params))
    batch = {"image": images, "weight": jnp.ones(4)}
    options = mala_fields.defaults().mala
    paint = lambda params: images + params["shift"]  # noqa: E731
    update = jax.jit(
        lambda state, batch: adversarial.update(judge, options, paint, state, batch, tx)
    )
    after, _ = update(state, batch)

    @jax.jit
    def twice(stats):  # originals, then painted images, and nothing more
        for x in (images, images + 0.1):
            own = {"params": drawn["params"], "batch_stats": stats}
            stats = judge.apply(own, 2 * x - 1, mutable=["batch_stats"])[1]["batch_stats"]
        return stats

    expected = twice(drawn["batch_stats"])
    for got, want in zip(
        jax.tree.leaves(after.collections["batch_stats"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_losses_of_painting_are_zero_for_equal_images():
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    parts = adversarial.paint_losses(images, images, jnp.ones(2))
    np.testing.assert_allclose([parts["l1"], parts["ssim"]], 0, atol=1e-6)
    other = adversarial.paint_losses(images, 1 - images, jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(other["ssim"], 1 - ssim.ssim_map(images, 1 - images)[0].mean(), 1e-5)


def test_a_map_of_zero_logits_costs_a_half_and_a_quarter_of_ln_2(method, variables):
    zero = jax.tree.map(jnp.zeros_like, variables["params"]["tbm"])
    blank = {**variables, "params": {**variables["params"], "tbm": zero}}
    mask = jnp.zeros((2, 64, 64), bool).at[0, 5:20, 7:9].set(True)
    batch = {"image": jnp.full((2, 64, 64, 3), 0.5), "mask": mask, "weight": jnp.ones(2)}
    loss, (_, logs) = jax.jit(lambda v: method.loss("localise", v, {}, batch, None, {}))(blank)
    np.testing.assert_allclose(logs["l1"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(logs["focal"], 0.25 * np.log(2), rtol=1e-4)
    np.testing.assert_allclose(loss, logs["l1"] + logs["focal"], rtol=1e-6)
    assert logs["defects"] == 1


@pytest.mark.parametrize("side", [1, 11, 21, 32])
@pytest.mark.parametrize("place", [(30, 40), (0, 0)])
def test_the_score_of_a_single_bright_pixel_counts_zeros_beyond_the_border(side, place):
    maps = jnp.zeros((1, 64, 64)).at[0, *place].set(1.0)
    pooled = anomaly_map.pooled(maps, side)
    np.testing.assert_allclose(pooled.max(), 1 / side**2, rtol=1e-5)


def test_pooling_is_torchs_average_pool():
    torch = pytest.importorskip("torch")
    maps = np.random.default_rng(0).random((2, 40, 48), np.float32)
    for side in (1, 11, 21, 32):
        want = torch.nn.functional.avg_pool2d(torch.tensor(maps), side, 1, side // 2)
        np.testing.assert_allclose(anomaly_map.pooled(jnp.asarray(maps), side), want, atol=1e-6)


def test_the_pipeline_reconstruct_runs_stage_1_and_compares(tiny_config):
    own = methods.create("mala", configured(tiny_config, pipeline="reconstruct"))
    assert own.stage_names == ("reconstruct",)
    drawn, _ = own.init(jax.random.key(0), {})
    assert set(drawn["params"]) == {"autoencoder", "plpm"}
    images = jax.random.uniform(jax.random.key(1), (2, 64, 64, 3))
    predict = jax.jit(own.predict)
    found = predict(drawn, {}, images)
    np.testing.assert_array_equal(found["map"], predict(drawn, {}, images)["map"])  # no chance
    assert set(found["parts"]) == {"error"}


@pytest.mark.parametrize(
    ("fields", "stages", "parts"),
    [
        ({"plpm": "none"}, ("reconstruct", "localise"), {"autoencoder", "tbm"}),
        ({"tbm": "none"}, ("reconstruct", "localise"), {"autoencoder", "plpm", "tbm"}),
        ({"stage1": False, "freeze": False}, ("localise",), {"autoencoder", "tbm"}),
    ],
)
def test_switches_of_the_ablation_change_stages_and_networks(tiny_config, fields, stages, parts):
    own = methods.create("mala", configured(tiny_config, **fields))
    assert own.stage_names == stages
    shapes = jax.eval_shape(lambda key: own.init(key, {})[0], jax.random.key(0))
    assert set(shapes["params"]) == parts
    assert ("balance" in shapes["params"]["tbm"]) == (fields.get("tbm") != "none")


def test_freeze_decides_whether_stage_2_trains_the_encoder(tiny_config, method, variables):
    free = methods.create("mala", configured(tiny_config, freeze=False))
    more = names(free, variables, "localise") - names(method, variables, "localise")
    assert more
    assert all(path.startswith("autoencoder/") for path in more)
    assert any("encoder/blocks" in path for path in more)
    assert not any("mask_token" in path or "decoder" in path for path in more)


def test_batches_are_those_of_the_stages_that_run(tiny_config):
    config = configured(tiny_config, batch_sizes=(16, 8))
    assert methods.METHODS["mala"].batch_sizes(config) == {16, 8}
    config.mala.pipeline = "reconstruct"
    assert methods.METHODS["mala"].batch_sizes(config) == {16}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pipeline": "reconstruct", "stage1": False}, "scores by stage 1: set mala.stage1=true"),
        ({"stage1": False}, "freezes an encoder that has learned nothing; set mala.freeze=false"),
        ({"plpm": "printed"}, "mala.plpm=printed: choose one of adversarial, cooperative, none"),
        ({"epochs": (3,)}, r"mala.epochs=\(3,\): expected 2 numbers"),
        ({"paint_weights": (1.0, 1.0)}, "mala.paint_weights=.*expected 3 numbers"),
    ],
)
def test_values_that_cannot_work_are_refused_in_one_line(tiny_config, fields, message):
    config = configured(tiny_config, **fields)
    with pytest.raises(ValueError, match=message):
        config_lib.validate(config, methods.METHODS)


def test_an_image_size_that_16_does_not_divide_is_refused(tiny_config):
    config = configured(tiny_config)
    config.data.image_size = (100, 64)
    with pytest.raises(ValueError, match=r"must be a multiple of 16 px; try 96,64"):
        methods.create("mala", config)


def test_a_file_of_mae_without_its_decoder_needs_stage_1():
    options = mala_fields.defaults().mala
    options.stage1, options.init = False, "mae_pretrain_vit_large.pth"
    facts = {"mae": True, "decoder": False}
    with pytest.raises(ValueError, match=r"without its decoder.*mae_visualize_vit"):
        mala_fields.check_file(options, facts)
    mala_fields.check_file(options, {"mae": False, "decoder": False})  # a ViT of timm's authors
    mala_fields.check_file(options, {"mae": True, "decoder": True})
    options.stage1 = True
    mala_fields.check_file(options, facts)


def test_surfaces_are_data_sets_or_parts():
    surfaces = ("mvtec_ad/carpet", "magnetic_tile")
    assert mala_fields.is_surface("mvtec_ad/carpet", surfaces)
    assert not mala_fields.is_surface("mvtec_ad/cable", surfaces)
    assert mala_fields.is_surface("magnetic_tile/surface", surfaces)


def test_published_scores_have_the_papers_means():
    table = mala.MALA.published
    for dataset, image, pixel in (("mvtec_ad", 98.6, 97.1), ("visa", 93.0, 97.2)):
        rows = [v for k, v in table.items() if k.startswith(dataset) and not k.endswith("/all")]
        assert len(rows) == {"mvtec_ad": 15, "visa": 12}[dataset]
        assert np.mean([row["image_auroc"] for row in rows]) == pytest.approx(image, abs=0.1)
        assert np.mean([row["pixel_auroc"] for row in rows]) == pytest.approx(pixel, abs=0.1)


@pytest.mark.parametrize("table", ["paper", "tiles", "vit"])
def test_every_row_of_the_ablation_is_a_configuration_that_can_run(table):
    fields = ["mala.init=vit_tiny.safetensors"] if table == "vit" else []
    config = config_lib.load(f"configs/mala_ablation.py:{table}", fields)
    rows = sweep.plan(config)
    assert len({row.folder for row in rows}) == len(rows) >= 2
    kinds = [methods.create("mala", row.config) for row in rows]
    settings = [(kind.stage_names, kind.plpm, kind.tbm, kind.options.freeze) for kind in kinds]
    assert len(set(settings)) == len(settings)  # every row changes something


@pytest.mark.parametrize("pipeline", ["end2end", "reconstruct"])
def test_a_scorer_can_be_exported_for_a_batch_of_any_size(tiny_config, pipeline):
    own = methods.create("mala", configured(tiny_config, pipeline=pipeline))
    shapes = jax.eval_shape(lambda key: own.init(key, {})[0], jax.random.key(0))
    (b,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, 64, 64, 3), jnp.float32)

    def score(variables, images):
        return own.score(own.predict(variables, {}, images)["map"])

    assert str(jax.eval_shape(score, shapes, images).shape) == "(b,)"
