"""The part: a turbine blade as a height field with a material, laid out flat on a canvas.

The blade is one design (airfoil with film-cooling holes and trailing-edge slots, platform, fir-tree
root with a dot-peened number) with manufacturing tolerances and its own surface texture per image.
Everything here is geometry and material; light and camera are `render`, damage is `defects`.

Canvas: x to the right across the chord (leading edge left), y down from the tip to the root, z up
towards the camera; all three in canvas pixels, of which two make one pixel of the finished image.
"""

import dataclasses

import cv2
import numpy as np

HEIGHT, WIDTH = 468, 256
CENTRE = (128.0, 240.0)  # canvas point (x, y) which the pose of a scene moves
_TIP_Y, PLATFORM_Y, _ROOT_Y, _END_Y = 16.0, 342.0, 374.0, 456.0

_Y = np.arange(HEIGHT, dtype=np.float32)[:, None]
_X = np.arange(WIDTH, dtype=np.float32)[None, :]

_DIGITS = (  # 3 x 5 dot matrix, one octal digit per row, of 0..9
    "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717"
).split()


@dataclasses.dataclass
class Surface:
    """The visible surface of a part, as float32 arrays over the canvas.

    Attributes:
      height: [h, w] canvas pixels above the bench; 0 where there is no part.
      colour: [h, w, 3] linear RGB reflectance in [0, 1].
      matte: [h, w] in [0, 1]; 0 reflects the room like a mirror, 1 scatters like paint.
      tilt_x: [h, w] slope of the fine texture across x, added to the slope of `height`.
      tilt_y: [h, w] the same across y.
    """

    height: np.ndarray
    colour: np.ndarray
    matte: np.ndarray
    tilt_x: np.ndarray
    tilt_y: np.ndarray

    def copy(self) -> "Surface":
        """Returns a surface that shares no array with this one."""
        return Surface(**{f.name: getattr(self, f.name).copy() for f in dataclasses.fields(self)})


@dataclasses.dataclass
class Blade:
    """A surface and the outline of its airfoil, which the defects are placed by.

    Attributes:
      surface: the arrays over the canvas.
      leading: [h] x of the leading edge in every canvas row.
      trailing: [h] x of the trailing edge in every canvas row.
      tip: [w] y of the tip in every canvas column.
      holes: [h, w] bool, where cooling holes and slots are.
    """

    surface: Surface
    leading: np.ndarray
    trailing: np.ndarray
    tip: np.ndarray
    holes: np.ndarray

    def point(self, span: float, chord: float) -> tuple[float, float]:
        """Canvas point (x, y) at a fraction of the span (0 platform, 1 tip) and of the chord."""
        y = PLATFORM_Y + (_TIP_Y - PLATFORM_Y) * span
        left = float(np.interp(y, _Y[:, 0], self.leading))
        right = float(np.interp(y, _Y[:, 0], self.trailing))
        return left + (right - left) * chord, y


def noise(rng: np.random.Generator, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise over the canvas, [h, w] float32 of about unit variance.

    Args:
      rng: source of the values.
      cell_y: correlation length down the canvas, in canvas pixels (at least 1).
      cell_x: the same across.
    """
    return noise_tile(rng, HEIGHT, WIDTH, cell_y, cell_x)


def noise_tile(rng, height: int, width: int, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise like `noise`, [height, width]; drawn on a finer grid to hide the grid's axes."""
    fine_y, fine_x = max(cell_y / 2, 1.0), max(cell_x / 2, 1.0)
    rows = height if fine_y == 1 else int(height / fine_y) + 3
    columns = width if fine_x == 1 else int(width / fine_x) + 3
    grid = rng.standard_normal((rows, columns), np.float32)
    if cell_y >= 2 and cell_x >= 2:
        grid = cv2.GaussianBlur(grid, (0, 0), 0.9) * np.float32(3.2)
    elif cell_y >= 2 or cell_x >= 2:
        sigma_x, sigma_y = (0.9, 0.01) if cell_x >= 2 else (0.01, 0.9)
        grid = cv2.GaussianBlur(grid, (0, 0), sigma_x, sigmaY=sigma_y) * np.float32(1.75)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, a smooth cubic between."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def make_blade(rng: np.random.Generator) -> Blade:
    """One part of the design: its tolerances, its texture, its number.

    Args:
      rng: the generator of this part; equal generators give equal parts.
    """
    jitter = rng.uniform(-1.0, 1.0, 16).astype(np.float32)
    leading, trailing, tip = _outline(jitter)
    airfoil, edge = _airfoil_height(leading, trailing, tip, jitter)
    platform = _platform_height(jitter)
    root, root_edge = _root_height(jitter)
    solid = np.maximum(np.maximum(airfoil, platform), root)
    fillet = _smooth_max(airfoil, platform, 16.0)
    body = np.where((edge > 0.5) & (_Y < PLATFORM_Y + 4), fillet, solid)
    height = np.where(solid > 0, body, 0.0).astype(np.float32)
    is_airfoil = ((edge > 0) & (_Y < PLATFORM_Y - 2)).astype(np.float32)
    surface = _material(height, is_airfoil, rng, jitter)
    holes = _drill_holes(surface, leading, trailing, jitter)
    _peen_number(surface, root_edge, rng)
    return Blade(surface, leading[:, 0], trailing[:, 0], tip[0], holes)


def _outline(jitter: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading and trailing edge x [h, 1] and tip y [1, w]."""
    span = (PLATFORM_Y - _Y) / (PLATFORM_Y - _TIP_Y)
    chord = 192.0 - 38.0 * span + 5.0 * jitter[0] + 14.0 * np.clip(0.25 - span, 0, 1) ** 2
    sweep = 15.0 * np.sin(1.9 * span + 0.2) - 22.0 * span**2 + 3.0 * jitter[1] * span
    leading = CENTRE[0] - 0.50 * chord + sweep
    trailing = CENTRE[0] + 0.50 * chord + sweep + 5.0 * np.sin(np.pi * span)
    tip = _TIP_Y + 0.10 * (_X - CENTRE[0]) + 3.0 * jitter[2] + 0.0006 * (_X - CENTRE[0]) ** 2
    return leading.astype(np.float32), trailing.astype(np.float32), tip.astype(np.float32)


def _smooth_min(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """The minimum of two fields with a rounded corner of `width`."""
    h = np.clip(0.5 + 0.5 * (b - a) / width, 0.0, 1.0)
    return b + (a - b) * h - width * h * (1.0 - h)


def _smooth_max(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """The maximum of two fields with a filled corner of `width`."""
    return -_smooth_min(-a, -b, width)


def _round_edge(distance: np.ndarray, radius: float) -> np.ndarray:
    """Quarter-circle profile: 0 at the edge, 1 from `radius` inwards."""
    t = 1.0 - np.clip(distance / radius, 0.0, 1.0)
    return np.sqrt(np.maximum(1.0 - t * t, 0.0))


def _airfoil_height(leading, trailing, tip, jitter) -> tuple[np.ndarray, np.ndarray]:
    """Height of the cambered, twisted airfoil (0 outside) and distance to its edge, both [h, w]."""
    span = (PLATFORM_Y - _Y) / (PLATFORM_Y - _TIP_Y)
    c = np.clip((_X - leading) / (trailing - leading), 0.0, 1.0)
    edge = _smooth_min(_X - leading, trailing - _X, 6.0)
    edge = _smooth_min(edge, _Y - tip, 16.0)
    bulge = c**0.8  # highest nearer to the leading edge
    camber = (31.0 + 2.0 * jitter[3] - 9.0 * span) * 4.0 * bulge * (1.0 - bulge)
    twist = (c - 0.5) * (-18.0 + 34.0 * span + 3.0 * jitter[4])
    lift = 12.0 + 7.0 * (span - 0.45) ** 2 * 4.0
    top = lift + camber + twist
    rounding = 5.0 * (_round_edge(edge, 7.0) - 1.0)
    height = np.maximum(top + rounding, 3.0) * np.clip(edge + 0.5, 0.0, 1.0)
    return np.where(_Y > PLATFORM_Y + 12, 0.0, height), edge


def _platform_height(jitter: np.ndarray) -> np.ndarray:
    """Height of the platform plate with bevelled sides, [h, w]."""
    skew = 0.05 + 0.012 * jitter[5]
    y = _Y - (PLATFORM_Y + 17.0) - skew * (_X - CENTRE[0])
    x = _X - CENTRE[0] - 2.0
    edge = _smooth_min(116.0 + jitter[6] - np.abs(x), 17.0 - np.abs(y), 8.0)
    height = 54.0 - 5.0 * (1.0 - np.clip(edge / 5.0, 0.0, 1.0)) ** 1.5 + 0.02 * x
    return height * np.clip(edge + 0.5, 0.0, 1.0)


def _root_height(jitter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height of the fir-tree root, and the distance to its edge, both [h, w]."""
    t = (_Y - _ROOT_Y) / (_END_Y - _ROOT_Y)
    half = 80.0 - 22.0 * t + 8.0 * np.sin(2 * np.pi * (2.6 * t + 0.3))
    x = np.abs(_X - CENTRE[0] - 2.0 - 0.05 * (_Y - _ROOT_Y) - jitter[7])
    edge = _smooth_min((half - x) * 0.85, _END_Y - _Y, 7.0)
    height = 40.0 - 6.0 * (1.0 - np.clip(edge / 6.0, 0.0, 1.0)) ** 1.5
    return height * np.clip(edge + 0.5, 0.0, 1.0) * (_Y > _ROOT_Y - 12), edge


def _material(height, is_airfoil, rng, jitter) -> Surface:
    """Satin coated airfoil, bare machined platform and root; brushed and slightly uneven."""
    fine, coarse = noise(rng, 70, 1.0), noise(rng, 34, 2.2)
    brushed = 0.6 * fine + 0.5 * coarse
    milled = noise(rng, 1.0, 60)
    grain = rng.standard_normal((HEIGHT, WIDTH), dtype=np.float32)
    cloud = 0.6 * noise(rng, 60, 45) + 0.4 * noise(rng, 20, 16)
    strength = 0.045 * (1.0 + 0.3 * jitter[8])
    tilt_x = strength * is_airfoil * brushed + 0.012 * grain
    tilt_y = 0.05 * (1.0 - is_airfoil) * milled + 0.02 * is_airfoil * np.roll(grain, 7, axis=1)
    coating = np.array([0.56, 0.54, 0.51], np.float32) * (1.0 + 0.03 * jitter[9])
    steel = np.array([0.66, 0.66, 0.67], np.float32) * (1.0 + 0.04 * jitter[10])
    shade = 1.0 + is_airfoil * (0.05 * brushed + 0.035 * cloud) + (1.0 - is_airfoil) * 0.03 * milled
    blend = cv2.GaussianBlur(is_airfoil, (0, 0), 1.5)[..., None]
    colour = (blend * coating + (1.0 - blend) * steel) * shade[..., None]
    matte = 0.22 + 0.14 * is_airfoil + 0.05 * cloud
    return Surface(height, colour, np.clip(matte, 0, 1), tilt_x, tilt_y)


def _stamp(surface: Surface, mark: np.ndarray, depth: float, dark: float) -> None:
    """Presses a mark [h, w] in [0, 1] into the surface and darkens it."""
    on_part = mark * (surface.height > 4.0)
    surface.height -= depth * on_part
    surface.colour *= 1.0 - dark * on_part[..., None]
    surface.matte += (0.9 - surface.matte) * on_part


def _drill_holes(surface: Surface, leading, trailing, jitter) -> np.ndarray:
    """Drills rows of cooling holes, and slots at the trailing edge; returns where, [h, w]."""
    mark = np.zeros((HEIGHT, WIDTH), np.uint8)
    rows = ((17.0, 0.0, 3.1), (33.0, 10.0, 2.9), (96.0, 4.0, 2.7))
    for offset, shift, radius in rows:
        for y in np.arange(_TIP_Y + 30.0 + shift, PLATFORM_Y - 30.0, 20.0):
            x = float(leading[int(y), 0]) + offset + float(jitter[11])
            _dot(mark, x, y + float(jitter[12]), radius)
    for y in np.arange(_TIP_Y + 40.0, PLATFORM_Y - 30.0, 17.0):
        x = float(trailing[int(y), 0]) - 9.0
        start, end = ((int(16 * (x - d)), int(16 * y)) for d in (13.0, 0.0))
        cv2.line(mark, start, end, 255, 3, cv2.LINE_AA, 4)
    soft = cv2.GaussianBlur(mark, (0, 0), 0.7).astype(np.float32) / 255.0
    _stamp(surface, soft, 3.0, 0.88)
    return mark > 0


def _dot(mark: np.ndarray, x: float, y: float, radius: float) -> None:
    """Draws one anti-aliased disc."""
    cv2.circle(mark, (round(16 * x), round(16 * y)), round(16 * radius), 255, -1, cv2.LINE_AA, 4)


def _peen_number(surface: Surface, root_edge: np.ndarray, rng: np.random.Generator) -> None:
    """Dot-peens a serial number of five digits into the root."""
    mark = np.zeros((HEIGHT, WIDTH), np.uint8)
    x, y = CENTRE[0] - 36.0 + rng.uniform(-3, 3), _ROOT_Y + 14.0 + rng.uniform(-2, 2)
    for digit in rng.integers(0, 10, 5):
        for row, bits in enumerate(_DIGITS[digit]):
            for column in range(3):
                if int(bits) >> (2 - column) & 1:
                    _dot(mark, x + 3.9 * column, y + 3.9 * row, 1.5)
        x += 16.0
    soft = cv2.GaussianBlur(mark, (0, 0), 0.6).astype(np.float32) / 255.0
    _stamp(surface, soft * (root_edge > 4), 1.6, 0.55)
