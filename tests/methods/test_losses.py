"""The feature loss: golden values, closed forms, padding rows, safe gradients, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.methods import losses


@pytest.fixture(scope="module")
def maps(golden_dir):
    inputs = np.load(golden_dir / "maps" / "inputs.npz")
    nhwc = {k: jnp.asarray(v.transpose(0, 2, 3, 1)) for k, v in inputs.items()}
    student = {i + 1: nhwc[f"small__student{i}"] for i in range(3)}
    teacher = {i + 1: nhwc[f"small__teacher{i}"] for i in range(3)}
    return student, teacher, np.load(golden_dir / "maps" / "outputs.npz")


def test_loss_and_gradients_equal_the_official_code(maps, agree):
    student, teacher, want = maps
    loss = lambda z: losses.multi_scale_cosine(z, teacher, jnp.ones(2))  # noqa: E731
    (value, logs), gradients = jax.value_and_grad(loss, has_aux=True)(student)
    agree("loss", value, want["small__loss"], 1e-6)
    parts = [logs[f"loss_layer{i + 1}"] for i in range(3)]
    agree("loss of each scale", parts, list(want["small__loss_per_scale"]), 1e-6)
    for i in range(3):
        golden = want[f"small__grad_student{i}"].transpose(0, 2, 3, 1)
        largest = np.abs(golden).max()
        case = f"gradient of scale {i + 1}, in units of its maximum"
        agree(case, gradients[i + 1] / largest, golden / largest, 1e-5)


def test_degenerate_vectors_have_torch_1_10_distances_and_finite_gradients(golden_dir, agree):
    """Zero, tiny, equal, opposite: that torch clamps the product of the norms, not each one.

    The golden values come from a newer torch, which differs where a norm is below its epsilon.
    """
    want = np.load(golden_dir / "maps" / "outputs.npz")
    student, teacher = (want[f"edge__{n}"].transpose(0, 2, 3, 1) for n in ("student", "teacher"))
    norms = [np.linalg.norm(x.astype(np.float64), axis=-1) for x in (student, teacher)]
    dot = (student.astype(np.float64) * teacher).sum(axis=-1)
    clamped = 1 - dot / np.maximum(norms[0] * norms[1], 1e-8)
    got = losses.cosine_distance(jnp.asarray(student), jnp.asarray(teacher))
    agree("distance of degenerate vectors, torch 1.10's rule", got, clamped, 1e-6)
    usual = ~((norms[0] < 1e-8) ^ (norms[1] < 1e-8)) | (dot == 0)
    assert usual.sum() == 6
    agree("distance where both torch agree", got[usual], want["edge__dist"][usual], 1e-6)
    gradient = jax.grad(lambda z: losses.cosine_distance(z, jnp.asarray(teacher)).mean())(student)
    assert np.isfinite(gradient).all()


def test_orthogonal_features_cost_one_per_scale_and_lengths_do_not_matter(maps):
    student, teacher, _ = maps
    rows = jnp.ones(2)
    left, right = ({i: jnp.tile(jnp.eye(2)[k], (2, 4, 4, 1)) for i in (1, 2, 3)} for k in (0, 1))
    assert float(losses.multi_scale_cosine(left, right, rows)[0]) == pytest.approx(3, abs=1e-6)
    rng = np.random.default_rng(0)
    scaled = jax.tree.map(lambda z: z * rng.uniform(0.1, 9, (*z.shape[:3], 1)), student)
    a, b = (float(losses.multi_scale_cosine(z, teacher, rows)[0]) for z in (student, scaled))
    assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize(("factor", "expected"), [(3.0, 0.0), (-1.0, 6.0)])
def test_parallel_and_opposite_features_have_closed_forms(maps, factor, expected):
    teacher = jax.tree.map(lambda x: x + 0.1, maps[1])
    student = jax.tree.map(lambda x: factor * x, teacher)
    loss, _ = losses.multi_scale_cosine(student, teacher, jnp.ones(2))
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_padding_rows_do_not_count(maps):
    student, teacher, _ = maps
    one = jax.tree.map(lambda x: x[:1], (student, teacher))
    padded, _ = losses.multi_scale_cosine(student, teacher, jnp.array([1.0, 0.0]))
    alone, _ = losses.multi_scale_cosine(*one, jnp.ones(1))
    assert float(padded) == pytest.approx(float(alone), abs=1e-6)


def test_gradients_are_finite_at_zero_vectors():
    zero = jnp.zeros((1, 2, 4, 8))
    gradient = jax.grad(lambda z: losses.cosine_distance(z, zero + 1.0).sum())(zero)
    assert np.isfinite(gradient).all()
    gradient = jax.grad(lambda z: losses.cosine_distance(z, zero).sum())(zero)
    assert np.isfinite(gradient).all()


def test_bfloat16_features_keep_float32_distances():
    """A distance computed in bfloat16 has an error of 1e-2 at a mean distance of 1e-3."""
    rng = np.random.default_rng(0)
    f = rng.standard_normal((1000, 64)).astype(np.float32)
    z = f + 0.05 * rng.standard_normal(f.shape).astype(np.float32)
    exact = losses.cosine_distance(jnp.asarray(z), jnp.asarray(f))
    rounded = losses.cosine_distance(jnp.asarray(z, jnp.bfloat16), jnp.asarray(f, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    assert float(jnp.abs(exact - rounded).max()) < 2e-4
    assert len(np.unique(rounded)) > 900


@pytest.fixture(scope="module")
def focal_golden(golden_dir):
    return dict(np.load(golden_dir / "draem" / "synthesis.npz"))


def test_focal_loss_and_its_gradient_are_those_of_draem(focal_golden, agree):
    want = focal_golden
    target = want["focal__mask"][:, 0] > 0

    def loss(logits):
        return losses.focal(jax.nn.softmax(logits, axis=1)[:, 1], target).mean()

    with jax.enable_x64():
        logits = jnp.asarray(want["focal__logits"], "float64")  # channel 1 is the defect
        value, slope = map(np.asarray, jax.value_and_grad(loss)(logits))
    agree("focal", value, want["focal__value"], 1e-6)
    agree("focal gradient", slope, want["focal__grad"], 1e-8)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ((0.0, 0.0), 0.25 * np.log(2)),
        ((0.0, 60.0), 0.0),
        ((60.0, 0.0), -np.log(2e-5)),
    ],
)
def test_focal_loss_has_its_closed_forms(logits, expected):
    anomaly = jax.nn.softmax(jnp.asarray(logits))[1]
    value = losses.focal(anomaly, jnp.asarray(True))
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-9)


def test_cross_entropy_at_logit_zero_is_ln_2():
    for label in (0.0, 1.0):
        np.testing.assert_allclose(
            losses.binary_cross_entropy(jnp.zeros(3), label), np.log(2), rtol=1e-6
        )
    assert losses.binary_cross_entropy(jnp.float32(9.0), 1.0) < 1e-3
    np.testing.assert_allclose(losses.binary_cross_entropy(jnp.float32(9.0), 0.0), 9, rtol=1e-3)
