"""The losses of MMR+ against closed forms and slow oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.methods import contrast as losses_plus
from mmrjax.methods import losses
from mmrjax.models import projection

ROWS = jnp.ones(2)
SIDES = {1: 56, 2: 28, 3: 14}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def at_cosine(cosine):
    """A unit vector with this cosine to the first axis."""
    return jnp.array([cosine, (1 - cosine**2) ** 0.5, 0.0])


# --- weighted reconstruction


def maps_at_distance(error, b=2):
    """(student, teacher) maps of a 224 px image with the same cosine distance everywhere."""
    student = {i: jnp.broadcast_to(at_cosine(1 - error), (b, n, n, 3)) for i, n in SIDES.items()}
    teacher = {i: jnp.broadcast_to(at_cosine(1.0), (b, n, n, 3)) for i, n in SIDES.items()}
    return student, teacher


def square(top, left, side, b=2, image=224):
    mask = np.zeros((b, image, image), bool)
    mask[:, top : top + side, left : left + side] = True
    return jnp.asarray(mask)


def test_a_cell_counts_with_any_pixel_in_it():
    mask = square(8, 8, 9)
    assert [int(losses_plus.cells(mask, (n, n))[0].sum()) for n in SIDES.values()] == [9, 4, 4]
    mask = square(16, 16, 9)  # aligned to the grid of all three scales
    assert [int(losses_plus.cells(mask, (n, n))[0].sum()) for n in SIDES.values()] == [9, 4, 1]
    with pytest.raises(ValueError, match="cannot be cut"):
        losses_plus.cells(mask, (15, 15))


def test_a_defect_of_9_px_adds_044_percent():
    """e * (3 + 9 / 3136 + 4 / 784 + 1 / 196) = 3.013074 e: what the literal factor 2 is worth."""
    student, teacher = maps_at_distance(0.25)
    loss, _ = losses_plus.weighted_cosine(student, teacher, ROWS, square(16, 16, 9), 2.0)
    assert float(loss) == pytest.approx(0.25 * 3.013074, rel=1e-6)


@pytest.mark.parametrize("tiny_weight", [1, 2, 5, 10])
def test_balanced_adds_the_mean_of_the_tiny_cells(tiny_weight):
    student, teacher = maps_at_distance(0.25)
    tiny = square(16, 16, 9)
    loss, _ = losses_plus.weighted_cosine(student, teacher, ROWS, tiny, tiny_weight, balanced=True)
    assert float(loss) == pytest.approx(0.25 * 3 * tiny_weight, rel=1e-6)
    none = jnp.zeros_like(tiny)
    loss, _ = losses_plus.weighted_cosine(student, teacher, ROWS, none, tiny_weight, balanced=True)
    assert float(loss) == pytest.approx(0.25 * 3, rel=1e-6)


def test_cells_with_anything_ignored_are_no_anchors():
    """A square of 4 x 4, 2 x 2 and 1 x 1 cells, of which a pixel is ignored: one less of each."""
    features = [{i: draw(2, n, n, 5, seed=i + k) for i, n in SIDES.items()} for k in (0, 5, 9)]
    mask, pixel = square(16, 16, 16), square(16, 16, 1)
    counts = []
    for ignored in (None, pixel & False, pixel):
        _, logs = losses_plus.feature_contrast(
            jax.random.key(0), *features, mask, ignored, alike=2.0
        )
        counts.append(int(logs["contrast_cells"]))
    assert counts == [2 * (16 + 4 + 1), 2 * (16 + 4 + 1), 2 * (15 + 3 + 0)]


def test_an_ignored_cell_counts_as_one_without_loss():
    """16 px at a corner of the grid are 4 x 4, 2 x 2 and 1 x 1 cells; 17 px touch one more."""
    student, teacher = maps_at_distance(0.25)
    for side, sides in ((16, (4, 2, 1)), (17, (5, 3, 2))):
        ignored = square(16, 16, side)
        for tiny, balanced in ((jnp.zeros_like(ignored), False), (square(16, 16, 9), False),
                               (square(16, 16, 9), True)):  # fmt: skip
            loss, _ = losses_plus.weighted_cosine(
                student, teacher, ROWS, tiny, 2.0, balanced, ignored
            )
            left = 3 - sum(n * n / cells**2 for n, cells in zip(sides, (56, 28, 14), strict=True))
            assert float(loss) == pytest.approx(0.25 * left, rel=1e-6)
    tiny = square(16, 16, 9) | square(64, 64, 9)  # the mean of those that are not ignored
    loss, _ = losses_plus.weighted_cosine(student, teacher, ROWS, tiny, 2.0, True, ignored)
    assert float(loss) == pytest.approx(0.25 * (left + 3), rel=1e-6)


@pytest.mark.parametrize("balanced", [False, True])
def test_without_a_tiny_defect_it_is_the_loss_of_mmr(balanced):
    student = {i: draw(2, n, n, 5, seed=i) for i, n in SIDES.items()}
    teacher = {i: draw(2, n, n, 5, seed=9 + i) for i, n in SIDES.items()}
    weight, none = jnp.array([1.0, 0.0]), jnp.zeros((2, 224, 224), bool)
    got, logs = losses_plus.weighted_cosine(student, teacher, weight, none, 2.0, balanced)
    want, wanted_logs = losses.multi_scale_cosine(student, teacher, weight)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert logs.keys() == wanted_logs.keys()


def test_the_gradient_of_a_tiny_cell_is_exactly_doubled_and_no_other_changes():
    student = {i: draw(2, n, n, 5, seed=i) for i, n in SIDES.items()}
    teacher = {i: draw(2, n, n, 5, seed=9 + i) for i, n in SIDES.items()}
    tiny = square(16, 16, 9)
    plain, heavy = (
        jax.grad(lambda z, w=w: losses_plus.weighted_cosine(z, teacher, ROWS, tiny, w)[0])(student)
        for w in (1.0, 2.0)
    )
    for i, n in SIDES.items():
        factor = 1 + losses_plus.cells(tiny, (n, n))[..., None]
        np.testing.assert_array_equal(heavy[i], plain[i] * factor)


# --- contrast of features


def nce(p, n0, q=()):
    e = np.exp(np.array([p, n0, *q]) / 0.1)
    return -np.log(e[0] / e.sum())


@pytest.mark.parametrize(
    ("p", "n0", "expected"), [(1, 0.5, 0.006715), (0.5, 1, 5.006715), (0.3, 0.3, 0.693147)]
)
def test_info_nce_has_closed_forms(p, n0, expected):
    """One cell whose student vector has these cosines with the twin's and the defect's."""
    anchor = jnp.array([[1.0, 0.0, 0.0]])
    twin, defect = at_cosine(p)[None], at_cosine(n0)[None, ::1]
    seen = jnp.array([True])
    for negatives in (0, 32):  # a cell is no negative of its own
        got = losses_plus.info_nce(
            jax.random.key(0), anchor, twin, defect, seen, negatives, temperature=0.1
        )
        assert float(got[0]) == pytest.approx(expected, abs=2e-6)


def test_info_nce_equals_a_loop_over_cells():
    anchors, twins, own = (projection.unit(draw(20, 6, seed=s)) for s in (1, 2, 3))
    among = jnp.asarray(np.random.default_rng(0).random(20) < 0.5)
    rows = np.flatnonzero(among)
    got = losses_plus.info_nce(jax.random.key(0), anchors, twins, own, among, 32, 0.1)
    for i in range(20):
        cosine = [float(anchors[i] @ v[i]) for v in (twins, own)]
        others = [float(anchors[i] @ own[j]) for j in rows if j != i]
        assert float(got[i]) == pytest.approx(nce(*cosine, others), rel=1e-4)


def test_only_so_many_negatives_are_drawn_and_another_key_draws_others():
    anchors, twins, own = (projection.unit(draw(200, 6, seed=s)) for s in (1, 2, 3))
    among = jnp.ones(200, bool)
    first, again, other = (
        losses_plus.info_nce(jax.random.key(k), anchors, twins, own, among, 4, 0.1)
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    cosines = np.sort(np.asarray(anchors @ own.T), axis=1)
    most = [nce(float(a @ b), float(a @ c), q) for a, b, c, q in zip(
        anchors, twins, own, cosines[:, -4:], strict=True)]  # fmt: skip
    assert (np.asarray(first) <= np.array(most) + 1e-4).all()


def feature_maps(mask_cells):
    """Twin and defect orthogonal in the first image's cells, equal in the second's."""
    twin = {2: jnp.broadcast_to(at_cosine(1.0), (2, 4, 4, 3))}
    defect = {2: jnp.stack([jnp.broadcast_to(at_cosine(c), (4, 4, 3)) for c in (0.5, 0.95)])}
    mask = jnp.zeros((2, 16, 16), bool).at[:, :mask_cells].set(True)
    return twin, defect, mask


def test_cells_without_a_defect_or_in_which_the_teacher_sees_none_are_left_out():
    twin, defect, mask = feature_maps(4)  # one row of cells
    contrast = jax.jit(
        lambda z, mask: losses_plus.feature_contrast(
            jax.random.key(0), z, twin, defect, mask, negatives=0
        )
    )
    loss, logs = contrast(twin, mask)  # the student has repaired everything: p = 1, n0 = .5
    assert int(logs["contrast_cells"]) == 4  # of the first image alone: .95 is above .9
    assert float(loss) == pytest.approx(0.006715, abs=1e-6)
    loss, _ = contrast(defect, mask)  # it shows the defect as it is
    assert float(loss) == pytest.approx(5.006715, abs=1e-5)
    nothing, logs = contrast(defect, jnp.zeros_like(mask))
    assert float(nothing) == int(logs["contrast_cells"]) == 0


def test_contrast_pulls_towards_the_twin_with_finite_slopes():
    twin, defect, mask = feature_maps(4)
    loss = lambda z: losses_plus.feature_contrast(jax.random.key(0), z, twin, defect, mask)[0]  # noqa: E731
    halfway = {2: twin[2] + defect[2]}
    slope = jax.grad(loss)(halfway)[2]
    step = {2: halfway[2] - 0.1 * slope}
    assert float(loss(step)) < float(loss(halfway))
    assert not np.asarray(slope[0, 1:]).any()  # no defect there
    zero = jax.grad(loss)({2: jnp.zeros((2, 4, 4, 3))})[2]
    assert np.isfinite(zero).all()


# --- SupCon


def domain_loss(g, domain, is_defective, weight=None):
    weight = jnp.ones(len(g)) if weight is None else weight
    pairs = losses_plus.domain_pairs(jnp.asarray(domain), jnp.asarray(is_defective), weight)
    return float(losses_plus.supervised_contrast(projection.unit(g), *pairs))


def test_two_domains_aligned_and_antipodal_or_all_equal():
    """log(1 + 2 e^-20) = 4.1e-9 in exact arithmetic, and log 3."""
    domain, is_defective = [0, 1, 0, 1], [False, False, True, True]
    apart = jnp.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    assert domain_loss(apart, domain, is_defective) == pytest.approx(4.1e-9, abs=1e-6)
    assert domain_loss(jnp.ones((4, 2)), domain, is_defective) == pytest.approx(1.098612, abs=1e-6)


def test_a_small_alignment_loss_has_its_closed_form():
    """Cosine 0 instead of -1, where float32 can tell: log(1 + 2 e^-10)."""
    g = jnp.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    got = domain_loss(g, [0, 1, 0, 1], [False, False, True, True])
    assert got == pytest.approx(np.log1p(2 * np.exp(-10)), rel=0.01)


def slow_domain_loss(g, domain, y, t=0.1):
    g = g / np.linalg.norm(g, axis=1, keepdims=True)
    n, anchors = len(g), []
    for a in range(n):
        positives = [j for j in range(n) if y[j] == y[a] and domain[j] != domain[a]]
        negatives = [j for j in range(n) if y[j] != y[a]]
        if not positives:
            continue
        total = sum(np.exp(g[a] @ g[j] / t) for j in positives + negatives)
        anchors.append(np.mean([-np.log(np.exp(g[a] @ g[p] / t) / total) for p in positives]))
    return np.mean(anchors) if anchors else 0.0


def test_alignment_equals_a_loop_and_ignores_rows_of_weight_0():
    rng = np.random.default_rng(0)
    domain, y = rng.integers(0, 3, 12), rng.random(12) < 0.4
    domain[7], y[7] = 5, True  # alone in its domain
    g = np.asarray(draw(12, 5), float)
    want = slow_domain_loss(g, domain, y)
    assert domain_loss(jnp.asarray(g, jnp.float32), domain, y) == pytest.approx(want, rel=1e-4)
    padded = jnp.asarray(np.concatenate([g, g[:2] + 9]), jnp.float32)
    weight = jnp.array([1.0] * 12 + [0, 0])
    more = np.concatenate([domain, [1, 2]]), np.concatenate([y, [True, False]])
    assert domain_loss(padded, *more, weight) == pytest.approx(want, rel=1e-4)


def test_one_domain_has_nothing_to_align():
    assert domain_loss(draw(4, 3), [0] * 4, [False, True, False, True]) == 0
    slope = jax.grad(
        lambda g: losses_plus.supervised_contrast(
            g, *losses_plus.domain_pairs(jnp.zeros(4, int), jnp.arange(4) < 2, jnp.ones(4))
        )
    )(draw(4, 3))
    assert not np.asarray(slope).any()


def test_tokens_alike_are_positives_and_unlike_ones_negatives():
    positive, negative = losses_plus.token_pairs(jnp.array([True, False, True]))
    np.testing.assert_array_equal(positive, [[0, 0, 1], [0, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(negative, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


# --- CORAL


def test_coral_is_the_distance_of_covariances_over_four_squared_widths():
    g, domain = np.asarray(draw(40, 3)), np.arange(40) % 2
    g = np.where(domain[:, None] == 1, 2 * g, g)
    moments = losses_plus.running_moments(
        losses_plus.no_moments(4, 3), jnp.asarray(g), jnp.asarray(domain), jnp.ones(40)
    )
    covariances = [np.cov(g[domain == d].T, bias=True) for d in (0, 1)]
    want = np.sum((covariances[0] - covariances[1]) ** 2) / (4 * 9)
    assert float(losses_plus.coral(moments)) == pytest.approx(want, rel=1e-4)


def test_coral_of_three_domains_is_the_mean_over_pairs_and_of_one_nothing():
    squares = jnp.stack([s * jnp.eye(2) for s in (1.0, 2.0, 4.0, 0.0)])
    moments = {"count": jnp.array([1.0, 1, 1, 0]), "mean": jnp.zeros((4, 2)), "square": squares}
    want = np.mean([2 * 1.0, 2 * 9.0, 2 * 4.0]) / 16
    assert float(losses_plus.coral(moments)) == pytest.approx(want)
    moments["count"] = jnp.array([1.0, 0, 0, 0])
    assert float(losses_plus.coral(moments)) == 0


def test_moments_are_plain_averages_at_first_and_absent_domains_keep_theirs():
    moments = losses_plus.no_moments(2, 2)
    batches = [draw(6, 2, seed=s) for s in range(4)]
    weight = jnp.array([1.0] * 5 + [0.0])
    for g in batches:
        moments = losses_plus.running_moments(moments, g, jnp.zeros(6, int), weight)
    rows = np.stack(batches)[:, :5].reshape(-1, 2)
    np.testing.assert_allclose(moments["mean"][0], rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(moments["square"][0], rows.T @ rows / 20, atol=1e-6)
    np.testing.assert_array_equal(moments["count"], [4, 0])
    assert not np.asarray(moments["mean"][1]).any()
    for _ in range(60):
        moments = losses_plus.running_moments(moments, jnp.ones((6, 2)), jnp.zeros(6, int), weight)
    assert float(np.abs(moments["mean"][0] - 1).max()) < 0.01


# --- ramps


def test_ramps_follow_the_epochs():
    values = [float(losses_plus.ramp(jnp.int32(e), 20, 50)) for e in (0, 20, 35, 50, 199)]
    assert values == [0, 0, 0.5, 1, 1]
    assert [float(losses_plus.ramp(jnp.int32(e), 3, 3)) for e in (2, 3)] == [0, 1]
