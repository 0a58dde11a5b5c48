"""The method and the size of the view for `method.names=auto`, from the pictures alone.

The rule is provisional: PatchCore at 224 px for any number of pictures of any size. PatchCore needs
no training by gradient, and its bank has 1000 rows or more of however few pictures
(patchcore.coreset_of, configs/folder.py). A measured table of teachers, sizes and numbers of
pictures shall decide in its place.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mmrjax.methods import patchcore

SIDE = 224  # px of the view


class Choice(NamedTuple):
    """The choice of `choose`: method.names, other fields ("group.field": value), and the reason."""

    names: tuple[str, ...]
    fields: dict[str, object]
    reason: str


def choose(count: int, sizes: Sequence[tuple[int, int]]) -> Choice:
    """Chooses for a folder.

    Args:
      count: good pictures that train.
      sizes: (height, width) of some of them, in px.

    Raises:
      ValueError: there is no picture.
    """
    if not count or not sizes:
        raise ValueError("--config.method.names=auto: there is no good picture to choose by")
    sides = sorted(min(size) for size in sizes)
    fields = {"data.image_size": (SIDE, SIDE), "data.resize": (SIDE, SIDE)}
    reason = (
        f"{count} good pictures of about {sides[len(sides) // 2]} px: {patchcore.PatchCore.title} "
        f"at {SIDE} px, which trains in one pass"
    )
    return Choice((patchcore.PatchCore.name,), fields, reason)
