"""What the embedded teacher learns: to make damage stand out among the views of a design.

PatchCore calls a patch defective when it is far from every patch of good parts. The objective is
that rule itself: a cell of a feature map is compared with the clean cells of the other views of its
design, and the distance to the nearest must tell whether the cell is damaged. Light, position, blur
and new samples of the same texture differ between views and are learned not to matter.
"""

import torch
import torch.nn.functional as F

MOST_CELLS = 100  # of a view that take part; more are sampled anew in every step
DAMAGED_WEIGHT = 4.0  # damaged cells are rare
LAYER_STRIDE = {1: 4, 2: 8, 3: 16}
# Pixels of damage from which a cell counts as damaged, per layer.
_LEAST_PIXELS = {1: 1, 2: 2, 3: 4}
# {name: weight}: layers 1 to 3 alone, and layers 2 and 3 together as PatchCore joins them.
TERMS = {"layer1": 0.5, "layer2": 1.0, "layer3": 1.0, "joined": 1.0}
FIRST_SCALE = (2.0, -2.0)  # slope before softplus, offset: one pair for each of TERMS


def loss(features: dict, scales: dict, damage: torch.Tensor, generator: torch.Generator):
    """Cross-entropy of "this cell is damaged", from distances alone.

    Args:
      features: {layer: float32 [e * v, c, h, w]} of layers 1 to 3.
      scales: {term: float32 [2]}, learned; FIRST_SCALE at the start.
      damage: uint8 [e, v, height, width], 0 where clean.
      generator: of the sample of cells.

    Returns:
      (scalar, {term: float}).
    """
    maps = {n: F.avg_pool2d(x, 3, 1, 1) for n, x in features.items()}
    deep = F.interpolate(maps[3], maps[2].shape[2:], mode="bilinear")
    channels = [x.shape[1] for x in (maps[2], deep)]
    joined = [
        x * (sum(channels) / c / 2) ** 0.5 for x, c in zip((maps[2], deep), channels, strict=True)
    ]
    terms = {
        "layer1": (maps[1], 1),
        "layer2": (maps[2], 2),
        "layer3": (maps[3], 3),
        "joined": (torch.cat(joined, 1), 2),
    }
    total, logs = 0.0, {}
    for name, (x, layer) in terms.items():
        labels = cell_labels(damage, layer)
        cells = x.permute(0, 2, 3, 1).reshape(*labels.shape, x.shape[1])
        if labels.shape[-1] > MOST_CELLS:
            kept = torch.randperm(labels.shape[-1], generator=generator)[:MOST_CELLS]
            cells, labels = cells[:, :, kept], labels[:, :, kept]
        value = _cross_entropy(nearest_distance(cells, labels), labels, scales[name])
        total, logs[name] = total + TERMS[name] * value, value.item()
    return total, logs


def cell_labels(damage: torch.Tensor, layer: int) -> torch.Tensor:
    """1 damaged, 0 clean, -1 beside damage (left out); int64 [e, v, cells of `layer`]."""
    stride = LAYER_STRIDE[layer]
    pixels = stride**2 * F.avg_pool2d((damage > 0).float(), stride)
    around = F.max_pool2d(pixels, 3, 1, 1)
    beside = torch.where(around > 0.5, -1, 0)
    return torch.where(pixels > _LEAST_PIXELS[layer] - 0.5, 1, beside).flatten(2)


def nearest_distance(cells: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Distance to the nearest clean cell of another view of the same design.

    Args:
      cells: float32 [e, v, n, c].
      labels: int [e, v, n]; 0 is clean. Where no other view has a clean cell, any cell is taken.

    Returns:
      float32 [e, v, n], the root of the mean square over channels.
    """
    e, v, n, c = cells.shape
    x = cells.reshape(e, v * n, c)
    with torch.no_grad():  # the search needs no gradient, the distance found does
        # |a - b|^2 without |a|^2, which is the same for all b.
        distance = torch.baddbmm(x.square().sum(-1)[:, None, :], x, x.mT, alpha=-2)
        view = torch.arange(v).repeat_interleave(n)
        comparable = (view[:, None] != view) & (labels.reshape(e, 1, v * n) == 0)
        nearest = distance.masked_fill_(~comparable, torch.inf).argmin(-1)
    difference = x - x.gather(1, nearest[..., None].expand(-1, -1, c))
    return torch.sqrt(difference.square().mean(-1) + 1e-4).reshape(e, v, n)


def _cross_entropy(
    distance: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    logits = F.softplus(scale[0]) * distance + scale[1]
    weight = torch.where(labels == 1, DAMAGED_WEIGHT, 1.0) * (labels >= 0)
    truth = (labels == 1).float()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, weight, reduction="sum")
    return entropy / weight.sum().clamp(min=1.0)
