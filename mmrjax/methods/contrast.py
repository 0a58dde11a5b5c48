"""The losses of MMR+: a heavier weight on tiny defects, contrast, and alignment of domains.

The proposal (papers/mmr_plus_proposal) names them without formulas; these are ours, and each has a
closed form in the tests. Features, cosines and sums are float32. Everything is of fixed shape:
cells, anchors and pairs that do not count have weight 0.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmrjax.methods import losses
from mmrjax.models import projection
from mmrjax.runtime import config as config_lib

FAR = -1e9  # the logit of a pair that is left out


def defaults() -> dict:
    """The fields of `config.mmr_plus` that weigh and contrast."""
    return {
        "tiny_weight": 2.0,  # of cells with a defect under 10 px, in the reconstruction
        "tiny_mode": "literal",  # literal (each weighs more) | balanced (their mean is added)
        # Of normal and abnormal: features (InfoNCE in the teacher's space) | tokens (SupCon) | none
        "contrast": "features",
        "contrast_weight": 0.1,
        "negatives": 32,  # other defect cells that each cell is held against
        "alike": 0.9,  # cosine of the teacher's features above which it does not see a defect
        "temperature": 0.1,
        # Of domains: supcon | coral | none. Needs training images of two or more domains.
        "domain": "none",
        "domain_weight": 0.05,
        "ramp": (20 / 200, 50 / 200),  # shares of the epochs between which both weights grow from 0
    }


def check(config: ConfigDict) -> None:
    """Raises ValueError for values of these fields that cannot work."""
    choices = {
        "mmr_plus.tiny_mode": ("literal", "balanced"),
        "mmr_plus.contrast": ("features", "tokens", "none"),
        "mmr_plus.domain": ("supcon", "coral", "none"),
    }
    config_lib.check_choices(config, choices)
    config_lib.check_ranges(
        config,
        ("mmr_plus.tiny_weight", 1.0, 1e3),
        ("mmr_plus.contrast_weight", 0.0, 1e3),
        ("mmr_plus.negatives", 0, 1 << 10),
        ("mmr_plus.alike", -1.0, 1.0),
        ("mmr_plus.temperature", 1e-3, 1e3),
        ("mmr_plus.domain_weight", 0.0, 1e3),
        ("mmr_plus.ramp", 0.0, 1.0),
    )
    config_lib.check_interval(config, "mmr_plus.ramp")


def cells(mask: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Which cells of a feature map hold any pixel of a mask: [b, h, w] to bool [b, *grid].

    A maximum: in the mean over its cell, a defect of 9 px would almost vanish.
    """
    b, h, w = mask.shape
    if h % grid[0] or w % grid[1]:
        raise ValueError(f"a mask of {(h, w)} px cannot be cut into {grid} cells")
    return mask.reshape(b, grid[0], h // grid[0], grid[1], w // grid[1]).any(axis=(2, 4))


def weighted_cosine(
    student: dict[int, jax.Array],
    teacher: dict[int, jax.Array],
    weight: jax.Array,
    tiny: jax.Array,
    tiny_weight: float,
    balanced: bool = False,
    ignored: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`losses.multi_scale_cosine` in which the cells of tiny defects weigh more.

    Divided by the number of cells, not by the sum of weights: without a tiny defect it is the loss
    of MMR, and a tiny cell's gradient is exactly `tiny_weight` times another's.

    Args:
      student: {layer: [b, h_l, w_l, c_l]}.
      teacher: the same layers.
      weight: [b], 0 for padding rows.
      tiny: bool [b, h, w] px.
      tiny_weight: weight of a cell with any tiny pixel; 2 in the proposal.
      balanced: give the mean over the tiny cells of the batch the weight `tiny_weight` - 1 instead.
        A defect of 9 px changes the plain form by less than half a percent.
      ignored: bool [b, h, w] px, None for none: a cell with any of them counts as one without loss.

    Returns:
      (scalar float32, {"loss_layer<l>": scalar}).
    """
    total = jnp.maximum(weight.sum(), 1e-9)
    logs = {}
    for layer, target in teacher.items():
        distance = losses.cosine_distance(student[layer], target)  # [b, h_l, w_l]
        heavy = cells(tiny, distance.shape[1:])
        if ignored is not None:
            left_out = cells(ignored, distance.shape[1:])
            distance, heavy = jnp.where(left_out, 0.0, distance), heavy & ~left_out
        extra = (tiny_weight - 1) * heavy
        if balanced:
            own = heavy * weight[:, None, None]
            mean = jnp.sum(distance.mean(axis=(1, 2)) * weight) / total
            among = jnp.sum(own * distance) / jnp.maximum(own.sum(), 1.0)
            logs[f"loss_layer{layer}"] = mean + (tiny_weight - 1) * among
        else:
            per_image = ((1 + extra) * distance).mean(axis=(1, 2))
            logs[f"loss_layer{layer}"] = jnp.sum(per_image * weight) / total
    return sum(logs.values()), logs


def feature_contrast(
    key: jax.Array,
    student: dict[int, jax.Array],
    normal: dict[int, jax.Array],
    defective: dict[int, jax.Array],
    mask: jax.Array,
    ignored: jax.Array | None = None,
    *,
    negatives: int = 32,
    temperature: float = 0.1,
    alike: float = 0.9,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE in the teacher's space: the student is near the normal twin, far from the defect.

    Anchors are the student's features of defect cells; the positive is the teacher's feature of the
    normal twin in that cell, the negatives are its feature of the defective picture there and in
    up to `negatives` other defect cells of the batch. It pulls where the anomaly score is measured.

    Args:
      key: PRNG key that draws the other cells.
      student: {layer: [b, h_l, w_l, c_l]} of the defective pictures.
      normal: the teacher's features of their twins.
      defective: the teacher's features of the pictures.
      mask: bool [b, h, w] px, the defects.
      ignored: bool [b, h, w] px, None for none: cells with any of them are left out.
      negatives: other cells, drawn from each scale and shared by its anchors.
      temperature: temperature of the softmax.
      alike: cells in which the teacher's two features have a cosine above this are left out: it
        does not see the defect there.

    Returns:
      (mean over the anchors of all scales, 0 without any; {"contrast_cells": their number}).
    """
    total = count = jnp.float32(0)
    keys = jax.random.split(key, len(student))
    for key, (layer, z) in zip(keys, sorted(normal.items()), strict=True):
        found = cells(mask, z.shape[1:3])
        if ignored is not None:
            found &= ~cells(ignored, z.shape[1:3])
        anchors = _flat_unit(student[layer])
        twins, defects = _flat_unit(z), _flat_unit(defective[layer])
        seen = found.reshape(-1) & (jnp.sum(twins * defects, axis=-1) <= alike)
        per_cell = info_nce(key, anchors, twins, defects, seen, negatives, temperature)
        total += jnp.sum(jnp.where(seen, per_cell, 0.0))
        count += seen.sum()
    return total / jnp.maximum(count, 1.0), {"contrast_cells": count}


def info_nce(
    key: jax.Array,
    anchors: jax.Array,
    positives: jax.Array,
    own: jax.Array,
    among: jax.Array,
    negatives: int,
    temperature: float,
) -> jax.Array:
    """-log(e^p / (e^p + e^n + sum of e^q)) of each row, cosines over the temperature: float32 [n].

    Args:
      key: PRNG key that draws q's.
      anchors: unit vectors [n, c].
      positives: unit vectors [n, c], whose cosine with the anchor is p.
      own: unit vectors [n, c], whose cosine with the anchor is n.
      among: bool [n], the rows of `own` from which the `negatives` shared q's are drawn; a row is
        no q of its own.
      negatives: number of q's, fewer where `among` has fewer.
      temperature: temperature of the softmax.
    """
    n = len(anchors)
    p, own_n = (jnp.sum(anchors * other, axis=-1) for other in (positives, own))
    logits = jnp.stack([p, own_n], axis=-1)
    if negatives:
        draw = jnp.where(among, jax.random.uniform(key, (n,)), -1.0)
        drawn, rows = jax.lax.top_k(draw, min(negatives, n))
        others = anchors @ own[rows].T  # [n, q]
        counts = (drawn >= 0) & (rows != jnp.arange(n)[:, None])
        logits = jnp.concatenate([logits, jnp.where(counts, others, FAR)], axis=-1)
    return -jax.nn.log_softmax(logits / temperature, axis=-1)[:, 0]


def _flat_unit(maps: jax.Array) -> jax.Array:
    """[b, h, w, c] to unit vectors float32 [b * h * w, c]; zero ones stay zero, slopes finite."""
    return projection.unit(maps.astype(jnp.float32).reshape(-1, maps.shape[-1]))


def supervised_contrast(
    g: jax.Array, positive: jax.Array, negative: jax.Array, temperature: float = 0.1
) -> jax.Array:
    """SupCon with chosen pairs: mean over anchors of the mean over their positives.

    L = mean_a mean_{p in P(a)} -log(e^{g_a g_p / t} / sum of e^{g_a g_j / t} over P(a) and N(a)).

    Args:
      g: unit vectors [n, c].
      positive: bool [n, n], P(a) in row a. Anchors without positives are skipped.
      negative: bool [n, n], N(a). Pairs that are neither are left out.
      temperature: t.

    Returns:
      Scalar float32; 0 when no anchor has a positive.
    """
    logits = jnp.matmul(g, g.T, precision=jax.lax.Precision.HIGHEST) / temperature
    counted = positive | negative
    total = jax.nn.logsumexp(jnp.where(counted, logits, FAR), axis=1, keepdims=True)
    per_pair = jnp.where(positive, total - logits, 0.0)
    pairs = positive.sum(axis=1)
    per_anchor = per_pair.sum(axis=1) / jnp.maximum(pairs, 1)
    return per_anchor.sum() / jnp.maximum((pairs > 0).sum(), 1)


def domain_pairs(
    domain: jax.Array, is_defective: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(positive, negative) of `supervised_contrast` across domains, bool [n, n] each.

    Positives: as defective or as good, of another domain. Negatives: the others in that respect, of
    any domain. Pairs alike in both are left out, and so are rows of weight 0.
    """
    real = weight > 0
    real = real[:, None] & real
    same = is_defective[:, None] == is_defective
    return real & same & (domain[:, None] != domain), real & ~same


def token_pairs(is_defective: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(positive, negative) among tokens, bool [n, n]: alike and not itself, or unlike."""
    same = is_defective[:, None] == is_defective
    return same & ~jnp.eye(len(is_defective), dtype=bool), ~same


def running_moments(
    old: dict[str, jax.Array],
    g: jax.Array,
    domain: jax.Array,
    weight: jax.Array,
    momentum: float = 0.9,
) -> dict[str, jax.Array]:
    """First and second moments of each domain, averaged over past batches.

    A batch has few images of a domain. At first the average is plain, then exponential; the slope
    runs through this batch alone.

    Args:
      old: {"count": float32 [d], "mean": [d, c], "square": [d, c, c]}, see `no_moments`.
      g: float32 [n, c].
      domain: int [n], below d.
      weight: [n], 0 for rows that do not count.
      momentum: the most that the past weighs.
    """
    old = jax.lax.stop_gradient(old)
    share = jax.nn.one_hot(domain, len(old["count"])) * weight[:, None]  # [n, d]
    found = share.sum(axis=0)
    share = share / jnp.maximum(found, 1.0)
    exact = jax.lax.Precision.HIGHEST
    mean = jnp.einsum("nd,nc->dc", share, g, precision=exact)
    square = jnp.einsum("nd,nc,ne->dce", share, g, g, precision=exact)
    keep = jnp.where(found > 0, jnp.minimum(momentum, old["count"] / (old["count"] + 1)), 1.0)
    new = {"mean": mean, "square": square}

    def blended(name: str) -> jax.Array:
        past = keep.reshape(-1, *[1] * (old[name].ndim - 1))
        return past * old[name] + (1 - past) * new[name]

    return {"count": old["count"] + (found > 0), **{name: blended(name) for name in new}}


def no_moments(domains: int, width: int) -> dict[str, jax.Array]:
    """The moments that `running_moments` begins with."""
    shapes = {"count": (), "mean": (width,), "square": (width, width)}
    return {name: jnp.zeros((domains, *shape), jnp.float32) for name, shape in shapes.items()}


def coral(moments: dict[str, jax.Array]) -> jax.Array:
    """Deep CORAL: |C_1 - C_2|² / (4 c²), mean over the pairs of domains seen so far; scalar.

    Sun and Saenko 2016, arXiv 1607.01719, Eq. 1. 0 with fewer than two domains.
    """
    mean, seen = moments["mean"], moments["count"] > 0
    covariance = moments["square"] - mean[:, :, None] * mean[:, None, :]
    gap = covariance[:, None] - covariance  # [d, d, c, c]
    squared = jnp.sum(gap**2, axis=(2, 3)) / (4 * mean.shape[1] ** 2)
    pair = seen[:, None] & seen & (jnp.arange(len(seen))[:, None] < jnp.arange(len(seen)))
    return jnp.sum(jnp.where(pair, squared, 0.0)) / jnp.maximum(pair.sum(), 1)


def ramp(epoch: jax.Array, first: int, last: int) -> jax.Array:
    """0 until epoch `first`, linear, 1 from epoch `last` on; float32 scalar."""
    if last <= first:
        return (epoch >= last).astype(jnp.float32)
    return jnp.clip((epoch - first) / (last - first), 0.0, 1.0).astype(jnp.float32)


def pooled(features: dict) -> jax.Array:
    """The mean of the visible tokens, float32 [b, d]."""
    return features["latent"][:, 1:].astype(jnp.float32).mean(axis=1)
