"""How a picture is taken: pose of the part, camera, lights and bench, drawn per domain.

`same` draws what the training images draw. Each other domain replaces one group of settings by
values that no training image has: `background` the bench, `illumination` the light, `view` the
camera.
"""

import dataclasses

import numpy as np

from data_builders.demo_parts import table_top

DOMAINS = ("same", "background", "illumination", "view")
_SHIFTED_BENCHES = tuple(name for name in table_top.FAMILIES if name not in table_top.MATS)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Settings of one picture; angles in degrees, lengths in canvas pixels, light in linear units.

    Attributes:
      turn: in-plane rotation of the part.
      scale: size of the part, 1 = nominal.
      shift: (x, y) of the part's centre from the middle of the picture.
      tilt: angle between the camera's axis and the vertical.
      azimuth: direction (0 = right, 90 = towards the viewer) the camera leans to.
      key_azimuth: direction of the main light, same convention.
      key_elevation: its angle above the bench.
      key_size: half width of the soft box, as a sine; small is hard light.
      key: RGB power of the main light.
      room: RGB power of the light from everywhere else.
      bench: family of `table_top.FAMILIES`.
      exposure: factor on everything.
      focus: sigma of the lens blur, in finished pixels.
      grain: sigma of the sensor noise at mid grey, in grey levels.
    """

    turn: float
    scale: float
    shift: tuple[float, float]
    tilt: float
    azimuth: float
    key_azimuth: float
    key_elevation: float
    key_size: float
    key: tuple[float, float, float]
    room: tuple[float, float, float]
    bench: str
    exposure: float
    focus: float
    grain: float


def draw_scene(rng: np.random.Generator, domain: str, number: int) -> Scene:
    """Settings of picture `number` of a domain.

    Args:
      rng: the generator of this scene.
      domain: one of `DOMAINS`.
      number: position within its group; mats and the kinds of a shifted domain take turns by it.
    """
    scene = _training_scene(rng, number)
    if domain == "background":
        return dataclasses.replace(scene, bench=_SHIFTED_BENCHES[number % len(_SHIFTED_BENCHES)])
    if domain == "illumination":
        return _relit(rng, scene, number)
    if domain == "view":
        return _moved(rng, scene, number)
    return scene


def _light(power: float, warmth: float) -> tuple[float, float, float]:
    """RGB of a light; warmth -1 is a blue sky, 0 neutral, 1 a tungsten lamp."""
    return (power * (1 + 0.30 * warmth), power * (1 + 0.02 * warmth), power * (1 - 0.38 * warmth))


def _training_scene(rng: np.random.Generator, number: int) -> Scene:
    """The set-up of the training images; the mats take turns."""
    u = rng.uniform
    return Scene(
        turn=u(10, 28),
        scale=u(0.88, 1.02),
        shift=(u(-20, 20), u(-10, 14)),
        tilt=u(7, 14),
        azimuth=u(75, 105),
        key_azimuth=u(200, 245),
        key_elevation=u(48, 60),
        key_size=u(0.26, 0.36),
        key=_light(u(0.85, 1.15), u(-0.08, 0.12)),
        room=_light(u(0.85, 1.1), u(-0.10, 0.06)),
        bench=table_top.MATS[number % len(table_top.MATS)],
        exposure=u(0.92, 1.08),
        focus=u(0.35, 0.6),
        grain=u(1.0, 1.8),
    )


def _relit(rng: np.random.Generator, scene: Scene, number: int) -> Scene:
    """Another light: tungsten from the right, cold window, dim lamp, hard torch."""
    u = rng.uniform
    right = {"key_azimuth": u(-50, 20), "key_elevation": u(40, 55)}
    left = {"key_azimuth": u(140, 180), "key_elevation": u(38, 50)}
    kinds = (
        {**right, "key": _light(1.15, u(0.5, 0.8)), "room": _light(0.6, u(0.3, 0.5))},
        {**left, "key": _light(1.1, u(-0.6, -0.4)), "room": _light(0.8, -0.4), "key_size": 0.5},
        {**right, "key": _light(0.5, u(0.0, 0.3)), "room": _light(u(0.35, 0.5), -0.1)},
        {**left, "key": _light(2.0, u(-0.1, 0.2)), "room": _light(0.4, 0.0), "key_size": 0.14},
        {**right, "key": _light(2.2, u(-0.2, 0.1)), "room": _light(1.3, 0.0), "key_size": 0.3},
    )
    return dataclasses.replace(scene, **kinds[number % len(kinds)])


def _moved(rng: np.random.Generator, scene: Scene, number: int) -> Scene:
    """Another camera: leaning to the other sides by more, the part turned the other way."""
    u = rng.uniform
    azimuth = (u(-115, -65), u(-25, 25), u(155, 205), u(60, 120))[number % 4]
    turn = (u(-20, 2), u(36, 56))[number // 4 % 2]
    scale = u(0.90, 1.02)
    return dataclasses.replace(scene, azimuth=azimuth, tilt=u(18, 28), turn=turn, scale=scale)
