"""From a part, a bench and a scene to a photograph.

The light is a room with a soft box, kept as a picture of all directions: metal looks like
metal because it mirrors its surroundings, more or less blurred. Shading is computed on the canvas
of the part; the camera then finds, for every ray, the point of the height field it meets first.
Called by `sample`; it knows nothing of defects, it only tells which pixels show a canvas point.
"""

import dataclasses

import cv2
import numpy as np

from data_builders.demo_parts import part
from data_builders.demo_parts import table_top as bench_lib
from data_builders.demo_parts.scene import Scene

SIZE = 256  # finished pixels
_RAYS = 2 * SIZE  # rays per side before the picture is reduced
_DISTANCE = 1150.0  # camera to bench, canvas pixels
_PAD = 96  # canvas pixels around the canvas that a shadow may reach
_ROOM = 96  # side of the picture of all directions


@dataclasses.dataclass
class Photo:
    """A picture before the sensor.

    Attributes:
      levels: [SIZE, SIZE, 3] float32 grey levels 0..255, without noise.
      meeting: points in which the rays met the part.
    """

    levels: np.ndarray
    meeting: "_Meeting"

    def touches(self, marked: np.ndarray) -> np.ndarray:
        """Share of each pixel's rays that met a marked canvas point.

        Args:
          marked: [h, w] bool over the canvas.

        Returns:
          [SIZE, SIZE] float32 in [0, 1].
        """
        met = self.meeting
        mark = cv2.remap(marked.astype(np.float32), met.x, met.y, cv2.INTER_LINEAR)
        film = np.zeros((_RAYS, _RAYS), np.float32)
        film.reshape(-1)[met.index] = mark[met.hit]
        return cv2.resize(film, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


class Studio:
    """A scene set up: camera, light and bench; any number of surfaces can be photographed in it."""

    def __init__(self, scene: Scene, bench: np.ndarray, rng: np.random.Generator):
        """Sets up the scene.

        Args:
          scene: settings of the picture.
          bench: tile of `table_top.make_tile`.
          rng: generator of the reflections of the room.
        """
        self.scene, self._tile = scene, bench
        self._rays = _cast(scene)
        self._room = _make_room(scene, rng)

    def photograph(self, surface: part.Surface) -> Photo:
        """Takes the picture of one surface."""
        shade = _surroundings(surface.height, self.scene)
        picture = _bench_colour(self._tile, self.scene, self._rays, shade[0], shade[2])
        colour = _shade(surface, self._rays.view, self._room, shade)
        met = _meet(surface.height, self._rays)
        on_part = cv2.remap(colour, met.x, met.y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        flank = np.exp(-np.maximum(met.below - 2.0, 0.0) / 8.0)  # turns into its own shadow
        picture.reshape(-1, 3)[met.index] = (on_part * flank[..., None])[met.hit]
        return Photo(_develop(picture, self.scene), met)


def expose(photo: Photo, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Adds sensor noise; equal generators add equal noise to equal grey levels.

    Returns:
      [SIZE, SIZE, 3] uint8 RGB.
    """
    noise = rng.standard_normal((SIZE, SIZE, 4), dtype=np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), 0.5) * 1.5
    sigma = scene.grain * np.sqrt(0.25 + photo.levels / 170.0)
    noisy = photo.levels + sigma * (0.75 * noise[..., 3:] + 0.5 * noise[..., :3])
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@dataclasses.dataclass
class _Rays:
    """Rays of the camera, [2 n, 2 n]: ground point on the canvas and canvas step per height.

    The ground point in the world is needed per finished pixel only, [n, n].
    """

    world_x: np.ndarray
    world_y: np.ndarray
    ground_x: np.ndarray
    ground_y: np.ndarray
    step_x: np.ndarray
    step_y: np.ndarray
    view: np.ndarray  # unit vector from the part to the camera, in canvas axes


def _turn(scene: Scene) -> tuple[float, float]:
    """Cosine and sine of the part's rotation."""
    return float(np.cos(np.deg2rad(scene.turn))), float(np.sin(np.deg2rad(scene.turn)))


def _direction(azimuth: float, elevation: float, scene: Scene) -> np.ndarray:
    """Unit vector towards a direction of the world, in the axes of the canvas."""
    a, e = np.deg2rad(azimuth - scene.turn), np.deg2rad(elevation)
    return np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], np.float32)


_FILM = np.arange(_RAYS, dtype=np.float32) - (_RAYS - 1) / 2  # position of the rays on the film


def _cast(scene: Scene) -> _Rays:
    """Pinhole camera looking at the middle of the bench."""
    t, a = np.deg2rad(scene.tilt), np.deg2rad(scene.azimuth)
    k = np.array([-np.sin(a), np.cos(a), 0.0])  # axis of the tilt
    cross = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    rotation = np.eye(3) + np.sin(t) * cross + (1 - np.cos(t)) * cross @ cross
    right, down, back = rotation[:, 0], rotation[:, 1], rotation[:, 2]
    camera = _DISTANCE * back
    camera32 = camera.astype(np.float32)
    direction = [
        np.float32(right[i]) * _FILM[None, :] + (np.float32(down[i]) * _FILM - camera32[i])[:, None]
        for i in range(3)
    ]
    reach = -camera32[2] / direction[2]
    world_x, world_y = camera32[0] + reach * direction[0], camera32[1] + reach * direction[1]
    cos, sin = _turn(scene)

    def to_canvas(x, y):
        x, y = (x - scene.shift[0]) / scene.scale, (y - scene.shift[1]) / scene.scale
        return cos * x + sin * y + part.CENTRE[0], -sin * x + cos * y + part.CENTRE[1]

    ground_x, ground_y = to_canvas(world_x, world_y)
    camera_x, camera_y = to_canvas(float(camera[0]), float(camera[1]))
    high = np.float32(camera[2] / scene.scale)
    view = np.array([cos * back[0] + sin * back[1], -sin * back[0] + cos * back[1], back[2]])
    step = ((np.float32(camera_x) - ground_x) / high, (np.float32(camera_y) - ground_y) / high)
    return _Rays(
        world_x[::2, ::2], world_y[::2, ::2], ground_x, ground_y, *step, view.astype(np.float32)
    )


@dataclasses.dataclass
class _Meeting:
    """Points in which rays may meet the part; the arrays are [n, 256] rays in film order.

    Attributes:
      x: canvas point.
      y: canvas point.
      below: how far under the top of the surface the ray came in: about 0 on a surface seen from
        above, large on a flank.
      hit: whether the ray met the part at all.
      index: [number of hits] position of the hits among all rays of the film.
    """

    x: np.ndarray
    y: np.ndarray
    below: np.ndarray
    hit: np.ndarray
    index: np.ndarray


def _meet(height: np.ndarray, rays: _Rays) -> _Meeting:
    """First meeting of every ray with the height field: fixed steps down, then one secant step."""
    top = float(height.max())
    index = _candidates(height, rays, top)
    ground_x, ground_y, step_x, step_y = (
        a.reshape(-1)[index].reshape(-1, 256)
        for a in (rays.ground_x, rays.ground_y, rays.step_x, rays.step_y)
    )
    count = max(4, int(np.ceil(top * float(np.hypot(step_x, step_y).max()) / 2.5)))
    drop = np.float32(top / count)
    hit = np.zeros(ground_x.shape, bool)
    z = np.zeros(ground_x.shape, np.float32)
    before = np.full(ground_x.shape, -1.0, np.float32)
    for level in np.linspace(top + 0.5, 0.5, count + 1, dtype=np.float32):
        x, y = ground_x + level * step_x, ground_y + level * step_y
        above = cv2.remap(height, x, y, cv2.INTER_LINEAR) - level
        new = (above > 0) & ~hit
        z[new] = level + drop * above[new] / (above[new] - before[new])
        hit |= new
        before = above
    x, y = ground_x + z * step_x, ground_y + z * step_y
    below = cv2.remap(height, x, y, cv2.INTER_LINEAR) - z
    return _Meeting(x, y, below, hit, index[hit.reshape(-1)])


def _candidates(height: np.ndarray, rays: _Rays, top: float) -> np.ndarray:
    """Flat positions of the rays that pass over the part's box, a multiple of 256 of them."""
    columns, rows = np.flatnonzero(height.any(0)), np.flatnonzero(height.any(1))
    reach_x = top * np.minimum(float(rays.step_x.min()), 0), top * max(float(rays.step_x.max()), 0)
    reach_y = top * np.minimum(float(rays.step_y.min()), 0), top * max(float(rays.step_y.max()), 0)
    near = (rays.ground_x > columns[0] - reach_x[1] - 2) & (
        rays.ground_x < columns[-1] - reach_x[0] + 2
    )
    near &= (rays.ground_y > rows[0] - reach_y[1] - 2) & (rays.ground_y < rows[-1] - reach_y[0] + 2)
    index = np.flatnonzero(near)
    return np.concatenate([index, np.repeat(index[-1:], -len(index) % 256)])


def _make_room(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The room as a mirror sees it in every direction: sharp, satin and matte, [3, n, n, 3].

    A direction (x, y, z) lies at ((x, y) / (1 + z) + 1) / 2 of the square.
    """
    axis = np.linspace(-1, 1, _ROOM, dtype=np.float32)
    p, q = np.meshgrid(axis, axis)
    r2 = p * p + q * q
    direction = np.stack([2 * p, 2 * q, 1 - r2], -1) / (1 + r2)[..., None]
    key = _direction(scene.key_azimuth, scene.key_elevation, scene)
    side = np.array([-key[1], key[0], 0], np.float32) / np.hypot(key[0], key[1])
    up = np.cross(key, side)
    along, across, facing = direction @ side, direction @ up, direction @ key
    soft = 0.07
    box = part.smoothstep(0, soft, scene.key_size * 1.5 - np.abs(along))
    box *= part.smoothstep(0, soft, scene.key_size - np.abs(across)) * (facing > 0)
    ceiling = 0.20 + 0.60 * part.smoothstep(-0.2, 0.95, direction[..., 2])
    grid = rng.uniform(0.6, 1.4, (6, 6)).astype(np.float32)
    clutter = cv2.resize(grid, (_ROOM, _ROOM), interpolation=cv2.INTER_CUBIC)
    cos, sin = _turn(scene)
    person = (
        direction[..., 0] * sin + direction[..., 1] * cos
    )  # towards the lower edge: it is darker
    ceiling *= clutter * (1.0 - 0.45 * part.smoothstep(0.1, 0.7, person))
    power = 0.32 / scene.key_size**1.2
    light = ceiling[..., None] * np.array(scene.room) + (power * box)[..., None] * np.array(
        scene.key
    )
    light = light.astype(np.float32)
    return np.stack([cv2.GaussianBlur(light, (0, 0), s) for s in (1.5, 5.0, 14.0)])


def _look_up(room: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The room in the given unit directions, [h, w, 3]."""
    scale = np.float32(0.5 * (_ROOM - 1)) / (1.0 + np.maximum(z, -0.5))
    middle = np.float32(0.5 * (_ROOM - 1))
    return cv2.remap(
        room,
        x * scale + middle,
        y * scale + middle,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _shade(surface: part.Surface, view, room, shade) -> np.ndarray:
    """Linear RGB of every canvas point, seen from `view`, [h, w, 3]."""
    smooth = cv2.GaussianBlur(surface.height, (0, 0), 0.9)
    nx = -cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=3, scale=0.125) - surface.tilt_x
    ny = -cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=3, scale=0.125) - surface.tilt_y
    nz = 1.0 / np.sqrt(nx * nx + ny * ny + 1.0)
    nx *= nz
    ny *= nz
    facing = 2.0 * (nx * view[0] + ny * view[1] + nz * view[2])
    mirror = (facing * nx - view[0], facing * ny - view[1], facing * nz - view[2])
    sharp, satin = np.clip(1.0 - surface.matte * 1.6, 0, 1), 1.0 - 0.75 * surface.matte
    light = _look_up(room[0], *mirror) * (sharp * satin)[..., None]
    light += _look_up(room[1], *mirror) * ((1.0 - sharp) * satin)[..., None]
    light += _look_up(room[2], nx, ny, nz) * (0.10 + 0.65 * surface.matte)[..., None]
    return light * surface.colour * _dimming(surface.height, shade)[..., None]


def _surroundings(height: np.ndarray, scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The effect of the part on the light around it, at half size, padded by _PAD, [h, w] each.

    Returns:
      height up to which points lie in the shadow of the key light, height of the near
      neighbourhood, height of the wider neighbourhood.
    """
    padded = cv2.copyMakeBorder(height, _PAD, _PAD, _PAD, _PAD, cv2.BORDER_CONSTANT, value=0)
    small = cv2.resize(padded, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    light = _direction(scene.key_azimuth, scene.key_elevation, scene)
    flat = float(np.hypot(light[0], light[1]))
    drop, away = float(light[2]) / flat, -light[:2] / flat
    size = (small.shape[1], small.shape[0])
    shadow = np.zeros_like(small)
    for step in np.arange(2.0, float(height.max()) / drop, 3.0):
        move = np.float32([[1, 0, away[0] * step / 2], [0, 1, away[1] * step / 2]])
        shadow = np.maximum(shadow, cv2.warpAffine(small, move, size) - np.float32(step * drop))
    shadow = cv2.GaussianBlur(shadow, (0, 0), 1.0 + 5.0 * scene.key_size)
    near, far = cv2.GaussianBlur(small, (0, 0), 3), cv2.GaussianBlur(small, (0, 0), 8)
    return shadow, 0.6 * near + 0.4 * far, far


def _dimming(height: np.ndarray, shade) -> np.ndarray:
    """Share of the light that reaches each point of the part past the rest of it, [h, w]."""
    inner = slice(_PAD // 2, -_PAD // 2)
    size = (height.shape[1], height.shape[0])
    shadow, around = (cv2.resize(a[inner, inner], size) - height for a in shade[:2])
    return np.exp(-np.maximum(around, 0.0) / 22.0) * (1 - 0.45 * part.smoothstep(1, 9, shadow))


def _bench_colour(tile: np.ndarray, scene: Scene, rays: _Rays, shadow, around) -> np.ndarray:
    """Linear RGB of the bench along every ray, with the shadow of the part on it; one per pixel."""
    half = np.float32((bench_lib.SIDE - 1) / 2)
    x, y = rays.world_x * 0.5 + half, rays.world_y * 0.5 + half
    colour = cv2.remap(tile, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    open_sky = np.exp(-around / 13.0)
    key = np.array(scene.key, np.float32) * np.float32(np.sin(np.deg2rad(scene.key_elevation)))
    fill = np.array(scene.room, np.float32) * np.float32(0.55)
    lit = (1.0 - part.smoothstep(0.0, 10.0, shadow)) * (0.5 + 0.5 * open_sky)
    light = open_sky[..., None] * fill + lit[..., None] * key
    x, y = (0.5 * (g[::2, ::2] + _PAD - 0.5) for g in (rays.ground_x, rays.ground_y))
    colour *= cv2.remap(light, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(colour, (_RAYS, _RAYS), interpolation=cv2.INTER_NEAREST)


def _develop(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """Lens, exposure and tone curve: linear rays [2n, 2n, 3] to grey levels [n, n, 3]."""
    small = cv2.resize(picture.astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), scene.focus)
    square = _FILM[::2] ** 2 / (2 * SIZE**2)
    fade = 1.0 - 0.22 * (square[:, None] + square[None, :])
    bright = small * fade[..., None] * np.float32(scene.exposure)
    toned = bright * (1.0 + bright * 0.16) / (1.0 + bright * 0.75)
    return 255.0 * np.clip(toned, 0.0, 1.0) ** np.float32(1 / 2.2)
