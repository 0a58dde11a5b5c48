"""Position tables: 2-D sine-cosine codes, and torch's bicubic resizes of tables.

Facts: arXiv 2304.02216's official code takes both from MAE (Apache-2.0 / CC BY-NC respectively);
only the formula is used here. DINO and DINOv2 resize in two other ways, see `TABLE_MODES`.
"""

import jax
import jax.numpy as jnp
import numpy as np

# How frozen ViTs bring a learned table to another grid; both are torch's bicubic interpolation.
#   offset: no antialiasing; the scale is (cells + 0.1) / side (DINO; DINOv2 without registers)
#   antialias: antialiasing, to the size (DINOv2 with registers; timm)
TABLE_MODES = ("offset", "antialias")
OFFSET = 0.1


def sincos_2d(width: int, grid_hw: tuple[int, int]) -> np.ndarray:
    """Position codes with a zero row for the class token in front.

    The first half of the channels encodes the column, the second half the row ("w first"); each
    half is [sin(p w_0..), cos(p w_0..)] with w_i = 10000^(-i / (width / 4)).

    Args:
      width: channels, divisible by 4.
      grid_hw: patches per column and per row.

    Returns:
      float32 [1 + h * w, width], computed in float64.
    """
    if width % 4:
        raise ValueError(f"width={width} must be divisible by 4; try {width // 4 * 4}")
    omega = 1.0 / 10000.0 ** (np.arange(width // 4) / (width / 4))

    def code(position: np.ndarray) -> np.ndarray:
        angle = position[:, None] * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row, column = np.indices(grid_hw).reshape(2, -1)
    table = np.concatenate([code(column), code(row)], axis=1)
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def resize_table(table: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Resizes a square position table [1 + g * g, d] to another grid as torch does.

    torch.nn.functional.interpolate(mode="bicubic", align_corners=False): cubic kernel a = -0.75,
    no antialiasing, indices clamped at the border. (jax.image.resize differs in all three.)
    """
    side = round((len(table) - 1) ** 0.5)
    if (side, side) == tuple(grid_hw):
        return table
    grid = table[1:].reshape(side, side, -1).astype(np.float64)
    rows, columns = (_bicubic_matrix(side, n) for n in grid_hw)
    out = np.einsum("yr,xc,rcd->yxd", rows, columns, grid).reshape(-1, table.shape[1])
    return np.concatenate([table[:1], out]).astype(np.float32)


def resized(table: jax.Array, side: int, grid_hw: tuple[int, int], mode: str) -> jax.Array:
    """Brings the learned table of a frozen ViT to another grid, in float32.

    Args:
      table: float32 [side * side, d], row by row, without the class token's row.
      side: cells per column and per row of the table.
      grid_hw: cells per column and per row of the image.
      mode: of TABLE_MODES.

    Returns:
      float32 [h * w, d]; `table` itself if the grid is the table's.
    """
    if (side, side) == tuple(grid_hw):
        return table
    if mode == "offset":
        rows, columns = (_bicubic_matrix(side, n, n + OFFSET) for n in grid_hw)
    else:
        rows, columns = (_antialiased_matrix(side, n) for n in grid_hw)
    rows, columns = rows.astype(np.float32), columns.astype(np.float32)
    grid = table.astype(jnp.float32).reshape(side, side, -1)
    exact = jax.lax.Precision.HIGHEST
    grid = jnp.einsum("yr,xc,rcd->yxd", rows, columns, grid, precision=exact)
    return grid.reshape(grid_hw[0] * grid_hw[1], -1)


def _bicubic_matrix(n_in: int, n_out: int, cells: float | None = None) -> np.ndarray:
    """The linear map [n_out, n_in] of torch's 1-D bicubic interpolation without antialiasing.

    `cells` is what the input is scaled to; the first `n_out` are returned.
    """
    source = (np.arange(n_out) + 0.5) * n_in / (cells or n_out) - 0.5
    base = np.floor(source).astype(int)
    matrix = np.zeros((n_out, n_in))
    for offset in range(-1, 3):
        index = np.clip(base + offset, 0, n_in - 1)
        np.add.at(matrix, (np.arange(n_out), index), _cubic(source - (base + offset), -0.75))
    return matrix


def _antialiased_matrix(n_in: int, n_out: int) -> np.ndarray:
    """The linear map [n_out, n_in] of torch's 1-D bicubic interpolation with antialiasing."""
    ratio = n_in / n_out
    centre = (np.arange(n_out)[:, None] + 0.5) * ratio
    matrix = _cubic((np.arange(n_in) + 0.5 - centre) / max(1.0, ratio), -0.5)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel with constant `a`; 0 from a distance of 2 on."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
