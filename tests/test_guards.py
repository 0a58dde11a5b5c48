"""What makes the programs fast, read off the programs themselves: no clock decides anything here.

Counts, shapes and types in the lowered or compiled step, which hold on every machine.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import methods
from mmrjax.data import epochs
from mmrjax.data.augment import make_augment
from mmrjax.evaluate import scoring
from mmrjax.methods import base, optim
from mmrjax.runtime import checkpoint, logs
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import loop as train
from mmrjax.train import step as state

BATCH = 8
# XLA's defaults, which JAX_DISABLE_MOST_OPTIMIZATIONS (see conftest.py) takes back.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def whole(key, image, size):
    """In place of augmentation: an image that is finished already."""
    return image / 255.0


def abstract(config, devices=1, augment=whole, canvas=None, k=1, conv="auto"):
    """(step, predict, their abstract arguments) without a single parameter in memory."""
    mesh = mesh_lib.make_mesh(devices)
    method = methods.create("mmr", config)
    method.student, method.teacher = method.student.clone(conv=conv), method.teacher.with_conv(conv)
    plan = epochs.Plan(BATCH)
    stage = base.Stage(
        "train", config.train.epochs, plan, optim.optimiser(config.optim, config.train.epochs, 4)
    )
    size = canvas or tuple(config.data.image_size)

    images = jnp.zeros((1, *config.data.image_size, 3))
    variables = jax.eval_shape(lambda: method.student.init(jax.random.key(0), images))
    frozen = {
        "teacher": jax.eval_shape(lambda: method.teacher.module.init(jax.random.key(0), images))
    }
    initial = jax.eval_shape(lambda v: state.create(v, stage), variables)
    on_all, split = mesh_lib.replicated(mesh), mesh_lib.batched(mesh, 1)

    def place(tree, sharding):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type
            ),
            tree,
        )

    struct = jax.ShapeDtypeStruct
    resident = {"image": struct((20, *size, 3), np.uint8), "size": struct((20, 2), np.int32)}
    chunk = {"index": struct((k, BATCH), np.int32), "weight": struct((k, BATCH), np.float32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = state.make_train_step(method, stage, augment, 4, mesh)
    arguments = (*place((initial, frozen, resident), on_all), place(chunk, split), key)
    predict = scoring._window_program(base.Trained(method, None, None, {}, mesh), False)
    pixels = struct((BATCH, *config.data.image_size, 3), np.uint8)
    return step, arguments, predict, (variables, frozen, pixels)


def with_dtype(config, dtype):
    """The same with `dtype` and every scale, as the published methods have."""
    config = config.copy_and_resolve_references()
    config.train.compute_dtype, config.student.layers = dtype, (1, 2, 3)
    return config


@pytest.fixture(scope="module")
def bf16(tiny_config):
    """(configuration, step, evaluation) in bfloat16, as StableHLO."""
    config = with_dtype(tiny_config, "bfloat16")
    step, arguments, predict, images = abstract(config)
    return config, step.lower(*arguments).as_text(), predict.lower(*images).as_text()


# --- operations


@pytest.mark.parametrize(
    ("file", "training", "inference"),
    [("aebad", 120.55e9, 66.91e9), ("magnetic_tile", 7.4601e9, 4.9373e9)],
)
def test_the_programs_do_no_more_operations_than_the_networks_need(file, training, inference):
    """Counts by hand, two operations for each multiplication and addition of a product.

    XLA does not count padded taps and counts elementwise work: both are small.
    """
    config = config_lib.load(f"configs/{file}.py", ["student.init=scratch"])
    config.student.unroll = 12  # a loop's body would be counted once
    step, arguments, predict, images = abstract(config, conv="direct")
    trained = step.lower(*arguments).cost_analysis()["flops"] / BATCH
    scored = predict.lower(*images).cost_analysis()["flops"] / BATCH
    assert trained == pytest.approx(training, rel=0.03)
    assert scored == pytest.approx(inference, rel=0.03)


def test_no_convolution_reads_a_dilated_input(tiny_config, bf16):
    """The gradient of a strided or transposed convolution, several times slower, would."""
    step, arguments, predict, images = abstract(with_dtype(tiny_config, "float32"))
    texts = (step.lower(*arguments).as_text(), predict.lower(*images).as_text(), *bf16[1:])
    for text in texts:
        assert "stablehlo.convolution" in text
        assert not re.search(r"lhs_dilate = \[(?!1, 1\])", text)


def float32_products(text):
    """(how many products and convolutions of StableHLO take float32, how many of them round it).

    The latter ask for an algorithm that makes both operands bfloat16.
    """
    lines = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    assert len(lines) > 20
    takes = [line for line in lines if "xf32>" in re.search(r": \((.*?)\) ->", line)[1]]
    rounds = "lhs_precision_type = bf16, rhs_precision_type = bf16"
    return len(takes), sum(rounds in line for line in takes)


def test_only_the_crop_is_a_float32_product_in_a_bfloat16_step(bf16):
    config, text, _ = bf16
    logits = 2  # their gradient, float32, times queries and times keys: jax.nn's attention
    assert float32_products(text) == (logits, logits)
    step, arguments, _, _ = abstract(
        config, augment=make_augment(config, "rrc_flip"), canvas=(70, 80)
    )
    crop = 2  # rows and columns
    assert float32_products(step.lower(*arguments).as_text()) == (logits + crop, logits)


def test_only_the_map_operators_are_float32_products_in_a_bfloat16_evaluation(bf16):
    config, _, text = bf16
    assert float32_products(text) == (2 * len(config.student.layers), 0)


def test_what_is_set_apart_from_a_kernel_is_not_wide_in_float32(bf16):
    """XLA writes it out: in float32 the norms' statistics, one number a row, and nothing else."""
    apart = re.findall(r"stablehlo\.optimization_barrier .*: (.*)", bf16[1])
    shapes = re.findall(r"tensor<([\dx]+)xf32>", " ".join(apart))
    assert len(apart) > len(shapes) > 0
    assert {shape.rpartition("x")[2] for shape in shapes} == {"1"}


# --- memory, transfers and devices


@pytest.fixture(scope="module")
def compiled(tiny_config):
    """(the step for eight devices, compiled as well as a user's; the state it takes)."""
    step, arguments, _, _ = abstract(
        tiny_config, 8, make_augment(tiny_config, "rrc_flip"), (70, 80)
    )
    return step.lower(*arguments).compile(OPTIMISED), arguments[0]


def test_every_byte_of_the_state_is_updated_in_place(compiled):
    program, state = compiled
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= size


class MeanPicture(methods.base.Method):
    """Learns one mean picture: the loop around it is what is watched, and a step compiles fast."""

    def stages(self, records):
        train, optimiser = self.config.train, self.config.optim
        rates = optim.learning_rates(optimiser, train.epochs)
        tx = optim.optimiser(optimiser, train.epochs, 4)
        return [base.Stage("train", train.epochs, epochs.Plan(BATCH), tx, rates=rates)]

    def load_frozen(self):
        return {}, {}

    def init(self, key, frozen):
        return {"params": {"mean": jnp.zeros((64, 64, 3))}}, {}

    def loss(self, stage, variables, frozen, batch, key, progress):
        return jnp.mean((batch["image"] - variables["params"]["mean"]) ** 2), ({}, {})


class Photographs:
    """Pictures of noise, enough for a Feed."""

    def __len__(self):
        return 4 * BATCH

    def take(self, rows):
        return self

    def size(self, i, max_side):
        return 64, 64

    def image(self, i, max_side):
        return np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture
def watched(monkeypatch):
    """(what is put, shapes of what is fetched, steps built) while the loop of a training runs."""
    puts, fetched, steps = [], [], []
    loop, put, make = train._loop, mesh_lib.put_batch, state.make_train_step
    # Two devices: NumPy would read an array that lies on one CPU device without asking JAX.
    two, array = mesh_lib.make_mesh(2), type(jnp.zeros(()))
    value = array._value  # float(), np.asarray and jax.device_get all pass here

    def put_seen(tree, *args, **options):
        puts.append(tree)
        return put(tree, *args, **options)

    def value_seen(x):
        fetched.append(x.shape)
        return value.fget(x)

    def loop_seen(*args):
        with monkeypatch.context() as patch, jax.transfer_guard_host_to_device("disallow"):
            patch.setattr(mesh_lib, "put_batch", put_seen)
            patch.setattr(array, "_value", property(value_seen))
            return loop(*args)

    monkeypatch.setattr(mesh_lib, "make_mesh", lambda **_: two)
    monkeypatch.setattr(state, "make_train_step", lambda *a: steps.append(make(*a)) or steps[-1])
    monkeypatch.setattr(train, "_loop", loop_seen)
    return puts, fetched, steps


def test_the_loop_puts_indices_and_fetches_losses_once_a_chunk_and_compiles_once(
    tiny_config, watched, tmp_path, monkeypatch
):
    """Nothing else passes between host and device but, at a save, whether all is finite."""
    config = tiny_config.copy_and_resolve_references()
    config.train.epochs, config.train.steps_per_call = 3, 4
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.0)  # every chunk is shown: the most fetches
    monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda *_: None)  # it fetches everything
    train.train(MeanPicture(config), Photographs(), 0, tmp_path)
    puts, fetched, (step,) = watched
    images, *chunks = puts
    assert images.shape == (4 * BATCH, 64, 64, 3)
    assert [set(chunk) for chunk in chunks] == [{"index", "weight"}] * 3
    rates = (3,)  # of the epochs, a constant of the step: read once, as it is compiled
    assert fetched == [rates] + [(4,)] * 3 + [()]
    assert step._cache_size() == 1


def test_the_state_leaves_a_step_as_it_came_so_that_no_second_one_compiles(tiny_config):
    step, arguments, _, _ = abstract(tiny_config)
    new, _ = jax.eval_shape(step, *arguments)

    def kind(x):
        return x.shape, x.dtype, x.weak_type

    assert jax.tree.map(kind, new) == jax.tree.map(kind, arguments[0])


def test_an_evaluation_compiles_once_also_with_a_part_of_a_batch(tiny_config, monkeypatch):
    mesh = mesh_lib.make_mesh(1)
    method = methods.create("mmr", tiny_config)
    frozen = mesh_lib.replicate(method.load_frozen()[0], mesh)
    variables = mesh_lib.replicate(method.init(jax.random.key(0), frozen)[0], mesh)
    programs, made = [], scoring._window_program
    monkeypatch.setattr(
        scoring,
        "_window_program",
        lambda *arguments: programs.append(made(*arguments)) or programs[0],
    )
    scorer = scoring.Scorer(base.Trained(method, variables, frozen, {}, mesh), tiny_config)
    found = scorer.everything(Pictures())  # one whole batch of 8 and a part
    assert found.maps.shape == (11, 64, 64)
    assert programs[0]._cache_size() == 1


class Pictures:
    """Eleven records, enough for a Scorer."""

    def __len__(self):
        return 11

    table = {name: np.arange(11) for name in ("id", "label", "has_mask", "domain", "group")}  # noqa: RUF012

    def image(self, i):
        return np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    def mask(self, i):
        return np.zeros((64, 64), np.uint8)


COLLECTIVES = (
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def test_only_gradients_and_scalars_cross_devices(compiled, tiny_config):
    """Array by array: an activation would be one too many, whatever its size."""
    program, state = compiled
    found = re.findall(COLLECTIVES, program.as_text())
    assert {kind for _, kind in found} == {"all-reduce"}
    arrays = [array for types, _ in found for array in re.findall(r"(\w+)\[([\d,]*)\]", types)]
    assert {dtype for dtype, _ in arrays} == {"f32"}
    crossing = [math.prod(map(int, filter(None, shape.split(",")))) for _, shape in arrays]
    expected = [1] * (1 + len(tiny_config.student.layers))  # the batch's weight, losses
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        # Blocks' gradients cross inside the loop over blocks, which the text holds once.
        in_loop = "['encoder']['blocks']" in jax.tree_util.keystr(path)
        expected.append(x.size // (tiny_config.student.depth if in_loop else 1))
    assert sorted(crossing) == sorted(expected)
