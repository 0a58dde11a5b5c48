"""The encoder's position table in a file and in a model: 14x14, or of the model's image size.

The official code keeps the sine-cosine table of a 224 px image at every image size and resizes it
in each forward pass (bicubic, see models/positions.py); we do that once. Other files bring learned
tables of any square grid. Tables are [1 + n, d], the class token's row first.
"""

import math

import numpy as np

from mmrjax.models import positions
from mmrjax.models.student import ENCODER_GRID

Grid = tuple[int, int]


def fit_table(table: np.ndarray, grid: Grid) -> np.ndarray:
    """A file's table at the grid of a model; the table itself where nothing is to be done.

    Raises:
      ValueError: the table is neither of a square grid nor of this one.
    """
    if _side(table):
        return positions.resize_table(table, grid)
    if len(table) == 1 + grid[0] * grid[1]:
        return table
    raise ValueError(
        f"pos_embed has {len(table)} rows: expected a class token's and those of a square grid"
    )


def official_table(table: np.ndarray, grid: Grid | None) -> np.ndarray:
    """The 14x14 table of which a model's table is the resized form, or the table itself.

    A learned table that was resized stays as it is: the one it came from cannot be recovered bit
    for bit.

    Args:
      table: the position table of a model.
      grid: patch grid of the model; None if it is square.

    Raises:
      ValueError: a learned table that a reader of the file would take for one of another grid.
    """
    if not (grid or _side(table)):
        return table
    grid = grid or square_grid(table)
    official = positions.sincos_2d(table.shape[1], ENCODER_GRID)
    if np.array_equal(positions.resize_table(official, grid), table):
        return official
    if _side(table) not in (0, grid[0]):
        raise ValueError(
            f"a learned position table of {grid[0]} x {grid[1]} patches would be taken for one of "
            f"{_side(table)} x {_side(table)}; students of such images cannot be exported"
        )
    return table


def square_grid(table: np.ndarray) -> Grid:
    """The grid behind a table; ValueError when no square one has that many patches."""
    if side := _side(table):
        return side, side
    raise ValueError(f"a position table of {len(table)} rows is of no square grid: give its grid")


def _side(table: np.ndarray) -> int:
    """Side of a square grid's table; 0 when there is none."""
    side = math.isqrt(max(len(table) - 1, 0))
    return side if side * side == len(table) - 1 else 0
