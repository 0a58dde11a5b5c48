"""The encoder's position table: 14x14 in the official files, of the image's grid in a model.

The official code keeps the sine-cosine table of a 224 px image at every image size and resizes it
in each forward pass (bicubic, see models/positions.py); mmrjax resizes it once. Other files bring
learned tables of any square grid. Tables are [1 + n, d] for n patches; the class token's row is the
first.
"""

import math

import numpy as np

from mmrjax.models import positions
from mmrjax.models.student import ENCODER_GRID

Grid = tuple[int, int]


def fit_table(table: np.ndarray, grid: Grid) -> np.ndarray:
    """Resizes a file's table to the grid of a model.

    Args:
      table: float32 [1 + m, d], of a square grid or of `grid`.
      grid: patches per column and per row of the model's images.

    Returns:
      float32 [1 + n, d] for the n patches of `grid`.

    Raises:
      ValueError: the table is neither of a square grid nor of `grid`.
    """
    if _side(table):
        return positions.resize_table(table, grid)
    if len(table) == 1 + grid[0] * grid[1]:
        return table
    raise ValueError(
        f"pos_embed has {len(table)} rows: expected a class token's and those of a square grid"
    )


def official_table(table: np.ndarray, grid: Grid | None) -> np.ndarray:
    """The 14x14 table that resizes to a model's table, or the model's table itself.

    A learned table that was resized stays as it is: the table before the resizing cannot be
    recovered bit for bit.

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
    """The square grid of a table [1 + n, d]; ValueError if n is no square number."""
    if side := _side(table):
        return side, side
    raise ValueError(f"a position table of {len(table)} rows is of no square grid: give its grid")


def _side(table: np.ndarray) -> int:
    """Side of the square grid of a table [1 + n, d]; 0 if n is no square number."""
    side = math.isqrt(max(len(table) - 1, 0))
    return side if side * side == len(table) - 1 else 0
