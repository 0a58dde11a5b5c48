"""Hybrid attention: the counts of closed forms, exact limits, equal forms, no new parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import attention, masking, norm, student, vit

GRID = (14, 14)
ALL = np.arange(196)[None]
CHANNELS = {2: 8, 3: 16}


def hybrid(depth=3, heads=4, local=2, **settings):
    return attention.Hybrid(attention.fixed_kinds(depth, heads, local), **settings)


def tokens(ids, penalty=attention.HARD, sample=None, grid=GRID):
    return attention.Tokens(jnp.asarray(ids), penalty, sample, grid)


def some_ids(count, b=2, grid=GRID, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(grid[0] * grid[1])[:count] for _ in range(b)])


# --- counts


@pytest.mark.parametrize(("window", "pairs"), [(3, 1600), (5, 4096), (1, 196), (27, 196**2)])
def test_pairs_of_local_heads_on_the_full_grid(window, pairs):
    """(3 * 14 - 2)² and (5 * 14 - 6)²: a window is a square, clipped at the borders."""
    assert int(attention.local_pairs(ALL, GRID, window).sum()) == pairs


def test_pairs_of_local_heads_with_117_visible_patches():
    """117 + 1404 * 117 * 116 / (196 * 195) = 615.56 pairs, 5.26 a query, 0.42 % of them alone."""
    noise = np.random.default_rng(0).random((4000, 196))
    ids = np.argsort(noise, axis=1)[:, : masking.kept_tokens(196, 0.4)]
    pairs = np.asarray(jax.jit(lambda ids: attention.local_pairs(ids, GRID, 3))(ids))
    expected = 117 + 1404 * 117 * 116 / (196 * 195)
    assert expected == pytest.approx(615.56, abs=0.005)
    assert pairs.sum(axis=(1, 2)).mean() == pytest.approx(expected, abs=1)  # std of a mean: 0.2
    assert pairs.sum(axis=2).mean() == pytest.approx(5.26, abs=0.01)
    assert (pairs.sum(axis=2) == 1).mean() == pytest.approx(0.0042, abs=0.0004)


def test_a_lattice_has_49_patches_and_four_layers_cover_the_grid():
    seen = np.stack([attention.on_lattice(ALL[0], GRID, 2, layer) for layer in range(12)])
    assert (seen.sum(axis=1) == 49).all()
    for first in range(9):
        assert (seen[first : first + 4].sum(axis=0) == 1).all()
    np.testing.assert_array_equal(np.flatnonzero(seen[0])[:8], [0, 2, 4, 6, 8, 10, 12, 28])
    first = [int(np.flatnonzero(row)[0]) for row in seen[:4]]
    assert first == [0, 14, 1, 15]  # rows shift with every layer, columns with every second one
    assert 117 * 49 / 196 == 29.25
    visible = [attention.on_lattice(ids, GRID, 2, 0).sum() for ids in some_ids(117, 2000)]
    assert np.mean(visible) == pytest.approx(29.25, abs=0.2)


@pytest.mark.parametrize(("stride", "grid"), [(3, (14, 14)), (3, (7, 10)), (2, (5, 5))])
def test_lattices_of_other_strides_and_grids_cover_every_patch_once(stride, grid):
    ids = np.arange(grid[0] * grid[1])
    layers = range(stride**2)
    seen = np.stack([attention.on_lattice(ids, grid, stride, layer) for layer in layers])
    assert (seen.sum(axis=0) == 1).all()
    for layer in layers:
        listed = np.asarray(attention._lattice_ids(grid, stride, layer))
        np.testing.assert_array_equal(listed[listed < len(ids)], np.flatnonzero(seen[layer]))


def slow_allowed(ids, grid, window, stride, layer, kind):
    """The definition of the spec, pair by pair."""
    n = len(ids) + 1
    found = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(n):
            if i == 0 or j == 0 or i == j or kind == attention.FULL:
                found[i, j] = True
                continue
            (ri, ci), (rj, cj) = (divmod(ids[x - 1], grid[1]) for x in (i, j))
            if kind == attention.LOCAL:
                found[i, j] = max(abs(ri - rj), abs(ci - cj)) <= window // 2
            else:
                on_rows = (rj - layer % stride) % stride == 0
                found[i, j] = on_rows and (cj - (layer // stride) % stride) % stride == 0
    return found


@pytest.mark.parametrize("layer", [0, 1, 2, 7])
def test_pairs_are_those_of_the_definition(layer):
    ids, grid = some_ids(19, grid=(5, 7)), (5, 7)
    kinds = jnp.array([attention.GLOBAL, attention.FULL, attention.LOCAL])
    got = attention.allowed_pairs(hybrid(), tokens(ids, grid=grid), layer, kinds)
    for b, row in enumerate(ids):
        for head, kind in enumerate(kinds):
            want = slow_allowed(row, grid, 3, 2, layer, kind)
            np.testing.assert_array_equal(got[b, head], want)
    assert np.asarray(got).any(axis=-1).all()  # no query is without a key


def test_a_random_sample_replaces_the_lattice_in_all_layers():
    ids = some_ids(60)
    sample = np.random.default_rng(1).random((2, 196)) < 0.25
    kinds = jnp.array([attention.GLOBAL])
    first, second = (
        np.asarray(attention.allowed_pairs(hybrid(), tokens(ids, sample=sample), layer, kinds))
        for layer in (0, 1)
    )
    np.testing.assert_array_equal(first, second)
    want = np.take_along_axis(sample, ids, axis=1)[:, None, :] | np.eye(60, dtype=bool)
    np.testing.assert_array_equal(first[:, 0, 1:, 1:], want)


# --- one block


def block(settings, ids, penalty=attention.HARD, layer=0, kinds=None, heads=4):
    """(function of tokens x [b, 1 + k, 32], its vanilla twin) with the same parameters."""
    kinds = jnp.asarray(settings.kinds[layer] if kinds is None else kinds)
    limited = vit.Attention(heads, jnp.float32, settings)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, ids.shape[1] + 1, 32)), "float32")
    variables = vit.Attention(heads, jnp.float32).init(jax.random.key(0), x)
    where = tokens(ids, penalty)
    own = jax.jit(lambda x: limited.apply(variables, x, where, (layer, kinds)))
    vanilla = jax.jit(lambda x: vit.Attention(heads, jnp.float32).apply(variables, x))
    return x, own, vanilla


def test_a_window_of_27_and_stride_1_are_vanilla_attention():
    x, own, vanilla = block(hybrid(window=27, stride=1), some_ids(117))
    np.testing.assert_allclose(own(x), vanilla(x), atol=1e-5)


def test_a_soft_start_begins_as_vanilla_attention_and_ends_hard():
    ids = some_ids(50)
    x, own, vanilla = block(hybrid(), ids, penalty=0.0)
    np.testing.assert_array_equal(own(x), vanilla(x))
    hard = block(hybrid(), ids)[1](x)
    gaps = [np.abs(block(hybrid(), ids, penalty=p)[1](x) - hard).max() for p in (0.0, 1, 5, 30)]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[3] < 1e-6


def test_local_heads_do_not_react_to_anything_beyond_their_window():
    ids = np.stack([np.arange(196)] * 2)
    x, own, _ = block(hybrid(), ids, kinds=[attention.LOCAL] * 4)
    slope = jax.grad(lambda x: own(x)[0, 1 + 5 * 14 + 6].sum())(x)  # of patch (5, 6)
    reached = np.abs(np.asarray(slope[0])).max(axis=-1) > 0
    assert reached[0]  # the class token
    want = [r * 14 + c for r in (4, 5, 6) for c in (5, 6, 7)]
    np.testing.assert_array_equal(np.flatnonzero(reached[1:]), want)
    assert not np.asarray(slope[1]).any()


@pytest.mark.parametrize("kind", [attention.LOCAL, attention.GLOBAL])
def test_the_class_token_sees_everything(kind):
    x, own, vanilla = block(hybrid(), some_ids(50), kinds=[kind] * 4)
    np.testing.assert_allclose(own(x)[:, 0], vanilla(x)[:, 0], atol=1e-6)
    assert np.abs(own(x)[:, 1:] - vanilla(x)[:, 1:]).max() > 1e-3


@pytest.mark.parametrize(("layer", "count", "local"), [(0, 196, 1), (1, 117, 0), (6, 20, 4)])
def test_gathered_keys_give_the_result_of_the_mask(layer, count, local):
    ids = some_ids(count)
    order = np.random.default_rng(layer).permutation(4)  # local heads stand anywhere
    kinds = np.array(attention.fixed_kinds(1, 4, local)[0])[order]
    results = []
    for gather in (False, True):
        settings = attention.Hybrid((tuple(kinds.tolist()),) * 7, gather=gather)
        x, own, _ = block(settings, ids, layer=layer)
        results.append((own(x), jax.grad(lambda x, f=own: jnp.sum(f(x) ** 2))(x)))
    for masked, gathered in zip(*results, strict=True):
        np.testing.assert_allclose(masked, gathered, atol=1e-5)


def test_gathered_keys_on_a_grid_that_is_not_square():
    ids = some_ids(30, grid=(5, 9))
    results = []
    for gather in (False, True):
        settings = hybrid(gather=gather, stride=3, window=5)
        attend = jax.jit(attention.attend, static_argnums=3)
        q, k, v = np.random.default_rng(0).standard_normal((3, 2, 31, 4, 8)).astype(np.float32)
        where = tokens(ids, grid=(5, 9))
        results.append(attend(q, k, v, settings, where, 4, jnp.asarray(settings.kinds[0])))
    np.testing.assert_allclose(*results, atol=1e-5)


# --- heads


def test_layers_are_chosen_by_name():
    local, full = attention.LOCAL, attention.FULL
    first = {
        name: [row[0] for row in attention.fixed_kinds(12, 12, 6, name)]
        for name in ("all", "last_half", "alternate")
    }
    assert first["all"] == [local] * 12
    assert first["last_half"] == [full] * 6 + [local] * 6
    assert first["alternate"] == [full, local] * 6
    assert attention.fixed_kinds(1, 12, 6)[0].count(attention.GLOBAL) == 6


def test_mean_distances_of_known_attention():
    """Uniform attention looks as far as two patches are apart on average; sharp: not at all."""
    place = np.indices((4, 4)).reshape(2, -1)
    distance = np.hypot(*(place[:, :, None] - place[:, None]))
    q = np.zeros((2, 17, 2, 16), np.float32)
    q[:, 1:, 1] = 100 * np.eye(16)
    k = np.zeros_like(q)
    k[:, 1:, 1] = np.eye(16)
    k[:, 0] = 50.0  # the class token is left out
    got = attention.mean_distances(jnp.asarray(q), jnp.asarray(k), (4, 4))
    np.testing.assert_allclose(got, [[distance.mean(), 0]] * 2, atol=1e-5)


def test_the_nearest_heads_become_local():
    kinds = np.array(attention.fixed_kinds(3, 4, 2, "last_half"))
    distances = np.array([[1, 2, 3, 4], [4, 1, 3, 2], [0, 9, 8, 1]], float)
    local, far, full = attention.LOCAL, attention.GLOBAL, attention.FULL
    want = [[full] * 4, [far, local, far, local], [local, far, far, local]]
    np.testing.assert_array_equal(attention.shortest_local(distances, kinds), want)


# --- the student


def models(**settings):
    common = {"width": 48, "depth": 3, "heads": 4, "channels": CHANNELS}
    plain = student.MaskedStudent(**common)
    return plain, student.MaskedStudent(**common, hybrid=hybrid(**settings))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((2, 96, 96, 3)).astype(np.float32)


def test_the_same_parameters_under_the_same_names_with_the_same_values(images):
    plain, limited = (jax.jit(model.init)(jax.random.key(0), images) for model in models())
    np.testing.assert_array_equal(limited.pop("attention")["kinds"], hybrid().kinds)
    jax.tree.map(np.testing.assert_array_equal, plain, limited)


def test_the_full_student_has_101729728_parameters():
    kinds = attention.fixed_kinds(12, 12, 6)
    model = student.MaskedStudent(
        768, 12, 12, {1: 256, 2: 512, 3: 1024}, hybrid=attention.Hybrid(kinds)
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 101_729_728


def test_a_student_without_penalty_is_the_plain_one_and_with_it_another(images):
    plain, limited = models()
    variables = jax.jit(limited.init)(jax.random.key(0), images)
    noise = np.random.default_rng(1).random((2, 36))
    apply = jax.jit(lambda v, x, n, p: limited.apply(v, x, n, 0.4, p)[3])
    want = jax.jit(lambda v, x, n: plain.apply(v, x, n, 0.4)[3])(variables, images, noise)
    np.testing.assert_allclose(apply(variables, images, noise, 0.0), want, atol=1e-5)
    assert np.abs(apply(variables, images, noise, attention.HARD) - want).max() > 1e-3


def test_every_layer_gets_its_own_lattice_and_its_own_heads(images):
    """Each block of the stack against one computed by hand with that layer's number."""
    _, limited = models()
    variables = jax.jit(limited.init)(jax.random.key(0), images)
    kinds = jnp.array([[1, 2, 2, 1], [0, 0, 0, 0], [2, 1, 2, 2]])
    variables = {**variables, "attention": {"kinds": kinds}}
    _, kept = limited.apply(variables, images, mutable=["intermediates"])
    ((q, k),) = kept["intermediates"]["encoder"]["blocks"]["attn"]["queries_keys"]
    assert q.shape == k.shape == (3, 2, 37, 4, 12)
    ids, table = np.arange(36)[None], variables["params"]["encoder"]["blocks"]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 37, 48)), jnp.float32)
    stacked = {"params": {**variables["params"]["encoder"]}}
    encoder = vit.Encoder(3, 4, hybrid=limited.hybrid)
    where = tokens(ids, grid=(6, 6))
    got = encoder.apply(stacked, x, where, kinds)
    for layer in range(3):
        own = jax.tree.map(lambda leaf, i=layer: leaf[i], table)
        one = vit.Block(4, 4, norm.EPSILON, jnp.float32, limited.hybrid)
        x, _ = one.apply({"params": own}, x, where, (layer, kinds[layer]))
    final = norm.layer_norm(jnp.float32, "norm")
    want = final.apply({"params": variables["params"]["encoder"]["norm"]}, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_order_of_visible_patches_does_not_matter(images):
    """Limits follow the patches, not their places in the sequence."""
    x, _, _ = block(hybrid(), some_ids(50))
    ids = some_ids(50)
    order = np.random.default_rng(5).permutation(50)
    settings = hybrid()
    variables = vit.Attention(4, jnp.float32).init(jax.random.key(0), x)
    model = vit.Attention(4, jnp.float32, settings)
    layer = (1, jnp.asarray(settings.kinds[1]))
    one = model.apply(variables, x, tokens(ids), layer)
    moved = jnp.concatenate([x[:, :1], x[:, 1:][:, order]], axis=1)
    two = model.apply(variables, moved, tokens(ids[:, order]), layer)
    np.testing.assert_allclose(one[:, 1:][:, order], two[:, 1:], atol=1e-5)


@pytest.mark.parametrize("scale", [1, 300])  # of logits: unscaled exponentials would overflow
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("biased", [False, True])
def test_softmax_attention_and_its_gradients_are_those_of_jax(scale, queries, biased):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, queries, 3, 8)) * scale, jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 2, 7, 3, 8)), jnp.float32)
    hidden = rng.random((2, 3, queries, 7)) < 0.3
    bias = jnp.asarray(np.where(hidden, -1e9, 0.0), jnp.float32) if biased else None
    results = []
    for attend in (attention.softmax_attention, jax.nn.dot_product_attention):
        y, pull = jax.vjp(lambda q, k, v, attend=attend: attend(q, k, v, bias), q, k, v)
        results.append((y, *pull(jnp.cos(y))))
    for ours, theirs in zip(*results, strict=True):
        assert jnp.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * scale)


def test_softmax_attention_in_bfloat16_is_jax_s_own():
    q, k, v = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 5, 2, 8)), jnp.bfloat16)
    found = attention.softmax_attention(q, k, v)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jax.nn.dot_product_attention(q, k, v))
