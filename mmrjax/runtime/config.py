"""Configuration files and command-line overrides, with errors that say what to type instead.

`configs/<name>.py[:argument]` is looked up in the working directory, then in the installed package,
where `<name>` alone is enough.
`--config.group.field=value` overrides a field; values are parsed by the type of the default.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence

from ml_collections import ConfigDict

from mmrjax.runtime import files

PACKAGED = pathlib.Path(__file__).resolve().parents[2] / "configs"


# Types of the entries of tuples that are empty by default; a name may look like a number.
TUPLES = {
    "data.categories": str,
    "data.good": str,
    "data.bad": str,
    "data.masks": str,
    "data.join": str,
    "data.held_out": str,
    "eval.resize": int,
    "log.trackers": str,
}
PROTOCOLS = ("one_class", "k_shot", "one_for_all", "image_split", "track_a", "track_b")
CHOICES = {
    "data.protocol": PROTOCOLS,
    "data.interpolation": ("bilinear", "bicubic", "lanczos"),
    "data.feed": ("auto", "resident", "stream"),
    "teacher.positions": ("official", "offset", "antialias"),
    "train.augment": ("rrc_flip", "rrc", "none"),
    "train.compute_dtype": ("auto", "float32", "bfloat16"),
    "calibration.way": ("split", "leave_out", "auto"),
    "eval.stress": ("none", "dark"),
    "eval.metrics_mode": ("standard", "mmr"),
    "eval.pixel_metrics": ("auto", "exact", "streaming"),
    "sweep.average": ("domains", "images"),
    "sweep.judge": ("test", "held_out_defects"),
}
# Smallest and largest value of a field, or of every entry of a tuple.
RANGES = (
    ("optim.warmup", 0.0, 1.0),  # shares of train.epochs, not epochs
    ("optim.drops", 0.0, 1.0),
    ("optim.learning_rate", 0.0, 10.0),
    ("train.epochs", 1, 1 << 40),
    ("train.batch_size", 1, 1 << 40),
    ("train.crop_scale", 1e-3, 1.0),
    ("train.crop_ratio", 1e-2, 1e2),
    ("calibration.fraction", 0.0, 0.9),
    ("calibration.target_fpr", 1e-6, 0.999999),
    ("data.max_side", 0, 1 << 20),
    ("data.shots", 1, 1 << 20),
    ("data.split_seed", -1, (1 << 32) - 1),
    ("data.resident_gib", 0.0, 1e6),
    ("train.seeds", 0, (1 << 32) - 1),
    ("train.steps_per_call", 0, 1 << 20),
    ("train.fsdp", 1, 1 << 20),
    ("eval.batch_size", 1, 1 << 40),
    ("eval.bootstrap", 0, 1 << 20),
    ("eval.tiny_side", 2, 1 << 16),
    ("report.gallery", 0, 1 << 20),
    ("ckpt.every_seconds", 0.0, 1e9),
    ("ckpt.keep", 1, 1 << 40),
)


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a configuration file and applies overrides.

    Args:
      spec: path of a file that defines `get_config`, optionally followed by ":argument".
      overrides: "group.field=value" each.

    Raises:
      FileNotFoundError: no such file, listing those that exist.
      ValueError: a rejected argument, unknown field (with the nearest names) or a wrong type.
    """
    path, _, argument = spec.partition(":")
    get_config = _import(find(path)).get_config
    if argument and not inspect.signature(get_config).parameters:
        raise ValueError(f"--config={spec}: {path} takes no argument after the colon")
    with _naming_errors(path):
        config = get_config(argument) if argument else get_config()
    _check_fields(config, spec)
    override(config, overrides)
    return config


def override(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets "group.field=value" each, in place; ValueError as `load`."""
    for text in overrides:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--config.{name}: give a value, as in --config.{name}=…")
        _set(config, name, value)


def packaged() -> list[pathlib.Path]:
    """The configurations that come with mmrjax, sorted by name."""
    others = ("__init__", "common")
    return sorted(path for path in PACKAGED.glob("*.py") if path.stem not in others)


def find(path: str) -> pathlib.Path:
    """The file of a configuration: a path, or a name such as folder; FileNotFoundError if none."""
    given = pathlib.Path(path)
    if given.is_file():
        return given
    name = given.name if given.suffix else f"{given.name}.py"
    if str(given.parent) in (".", "configs") and (PACKAGED / name).is_file():
        return PACKAGED / name
    known = [f"configs/{p.name}" for p in packaged()]
    raise FileNotFoundError(f"no configuration file {path!r}; available: {', '.join(known)}")


def _import(path: pathlib.Path):
    _import_package()
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None:
        raise ValueError(f"--config={path}: expected a Python file, ending in .py")
    module = importlib.util.module_from_spec(spec)
    with _naming_errors(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config()")
    return module


@contextlib.contextmanager
def _naming_errors(path: str | pathlib.Path) -> Iterator[None]:
    """A configuration file is the user's program: whatever it raises becomes one line.

    A ValueError of the file is meant for people and stays as it is.
    """
    try:
        yield
    except ValueError:
        raise
    except SyntaxError as e:
        raise ValueError(f"--config={path}, line {e.lineno}: {e.msg}") from e
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        own = [f for f in frames if pathlib.Path(f.filename).name == pathlib.Path(path).name]
        where = f"{path}, line {own[-1].lineno}" if own else path
        raise ValueError(f"--config={where}: {type(e).__name__}: {e}") from e


def _check_fields(config: ConfigDict, spec: str) -> None:
    """Raises ValueError for a configuration without the very fields of configs/common.py."""
    wanted = flatten(_import(PACKAGED / "common.py").get_config())
    given = flatten(config) if isinstance(config, ConfigDict) else {}
    if lacking := sorted(wanted.keys() - given.keys()):
        raise ValueError(
            f"--config={spec}: get_config() lacks {', '.join(lacking[:4])}"
            f"{' …' if lacking[4:] else ''}; begin with common.get_config(), as configs/folder.py"
        )
    free = ("raw_dirs.", "sweep.")
    for name in sorted(given.keys() - wanted.keys()):
        if not name.startswith(free):
            hint = nearest(name, list(wanted))
            raise ValueError(f"--config={spec}: get_config() sets {name}, no such field; {hint}")


def _import_package() -> None:
    """Makes `from configs import common` mean ours, whatever folder of that name is around."""
    if getattr(sys.modules.get("configs"), "__file__", None):
        return
    spec = importlib.util.spec_from_file_location(
        "configs", PACKAGED / "__init__.py", submodule_search_locations=[str(PACKAGED), "configs"]
    )
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["configs"])


def flatten(config: ConfigDict) -> dict[str, object]:
    """{"group.field": value} of every field, sorted by name."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def _set(config: ConfigDict, name: str, text: str) -> None:
    flat = flatten(config)
    if name not in flat:
        raise ValueError(f"--config.{name}: no such field; {nearest(name, list(flat))}")
    if name == "sweep.rows":
        raise ValueError(f"--config.{name}: only a file declares it, see configs/aebad_ablation.py")
    value = parse(name, text, flat[name])
    *groups, field = name.split(".")
    for group in groups:
        config = config[group]
    config[field] = value


def nearest(name: str, known: list[str]) -> str:
    """The fields to type in place of a field that does not exist."""
    by_leaf = [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
    near = by_leaf or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    group = name.split(".")[0]
    inside = [k for k in known if k.startswith(f"{group}.")]
    return f"known: {', '.join(inside or sorted({k.split('.')[0] for k in known}))}"


def parse(name: str, text: str, default: object) -> object:
    """Parses `text` as the type of `default`."""
    kind = type(default).__name__
    wrong = ValueError(f"--config.{name}={text}: expected {kind}, such as {default!r}")
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise wrong
        return text.lower() in ("true", "1")
    if isinstance(default, tuple):
        return _parse_tuple(name, text, default)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as e:
        raise wrong from e
    if isinstance(default, float) and type(value) in (int, float):
        return float(value)
    if type(value) is not type(default):
        raise wrong
    return value


def _parse_tuple(name: str, text: str, default: tuple) -> tuple:
    """`54,55`, `(54, 55)`, `mmr,patchcore` and a single `54` alike; "" and "()" are empty.

    Items take the type of the default's first one; of an empty default, what TUPLES says.
    """
    kind = type(default[0]) if default else TUPLES.get(name, _value)
    parts = [part.strip().strip("'\"") for part in text.strip("()[] ").split(",")]
    try:
        return tuple(kind(part) for part in parts if part)
    except ValueError as e:
        example = default or (kind(1),)
        raise ValueError(f"--config.{name}={text}: expected values such as {example!r}") from e


def _value(text: str) -> object:
    """A number or a text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_choices(config: ConfigDict, choices: Mapping[str, Sequence]) -> None:
    """Raises ValueError if a field, "group.field", has none of its known values."""
    for name, known in choices.items():
        if _get(config, name) not in known:
            raise ValueError(
                f"--config.{name}={_get(config, name)}: choose one of {', '.join(known)}"
            )


def check_ranges(config: ConfigDict, *ranges: tuple[str, float, float]) -> None:
    """Raises ValueError if a field, or an entry of a tuple, lies outside (name, low, high)."""
    for name, low, high in ranges:
        value = _get(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(x, (int, float)) and low <= x <= high for x in values):
            small = high >= 1 << 40 and low == 1
            must = "must be at least 1" if small else f"must lie between {low} and {high}"
            raise ValueError(f"--config.{name}={value}: {must}")


def check_different(config: ConfigDict, *names: str) -> None:
    """Raises ValueError if a tuple is empty or names something twice."""
    for name in names:
        value = _get(config, name)
        if not value or len(set(value)) < len(value):
            raise ValueError(f"--config.{name}={value}: give one or more different values")


def check_interval(config: ConfigDict, *names: str) -> None:
    """Raises ValueError if a tuple is not (smallest, largest)."""
    for name in names:
        value = _get(config, name)
        if len(value) != 2 or value[0] > value[1]:
            raise ValueError(f"--config.{name}={value}: expected smallest,largest")


def check_odd(config: ConfigDict, *names: str) -> None:
    """Raises ValueError for an even number."""
    for name in names:
        if _get(config, name) % 2 == 0:
            raise ValueError(f"--config.{name}={_get(config, name)}: must be odd, as 1 or 3")


def check_folder(config: ConfigDict, name: str) -> None:
    """Raises ValueError if a field names a folder that is not on this machine."""
    folder = _get(config, name)
    if files.is_remote(folder):
        raise ValueError(f"--config.{name}={folder}: {files.LOCAL_ONLY}")
    if folder and not pathlib.Path(folder).is_dir():
        raise ValueError(f"--config.{name}={folder}: there is no such folder")


def _get(config: ConfigDict, name: str) -> object:
    group, field = name.split(".")
    return config[group][field]


def validate(config: ConfigDict, methods: Mapping[str, type]) -> None:
    """Raises ValueError for values that cannot work, before anything is computed.

    Args:
      config: the whole configuration.
      methods: {name: class}, of which each checks its own groups.
    """
    check_choices(config, CHOICES)
    check_ranges(config, *RANGES)
    check_interval(config, "train.crop_scale", "train.crop_ratio")
    check_different(config, "train.seeds", "method.names")
    for name in config.method.names:
        if name not in methods:
            raise ValueError(f"--config.method.names={name}: unknown; known: {sorted(methods)}")
    for name, place in (("data.raw_dir", config.data.raw_dir), *_places(config)):
        if files.is_remote(place):
            raise ValueError(f"--config.{name}={place}: {files.LOCAL_ONLY}")
    if files.is_remote(config.data.data_dir):
        files.check_address(config.data.data_dir)
    _check_tracks(config.data)
    _check_view(config)
    for kind in methods.values():
        kind.check(config)


def _places(config: ConfigDict) -> list[tuple[str, str]]:
    return [(f"raw_dirs.{name}", place) for name, place in config.raw_dirs.items()]


def _check_view(config: ConfigDict) -> None:
    """Raises ValueError for sizes that are none, or that cannot be cropped or tiled."""
    data = config.data
    sides = {"data.image_size": data.image_size, "data.resize": data.resize}
    if config.eval.resize:
        sides["eval.resize"] = config.eval.resize
    for name, value in sides.items():
        if len(value) != 2 or min(value) < 1:
            raise ValueError(f"--config.{name}={value}: expected height,width such as 224,224")
        if any(r < s for r, s in zip(value, data.image_size, strict=True)):
            raise ValueError(
                f"--config.{name}={value}: smaller than data.image_size={data.image_size}, which "
                "is cropped from it"
            )
    overlap, smallest = data.tile_overlap, min(data.image_size)
    if data.tiling and not 0 <= overlap < smallest:
        raise ValueError(
            f"--config.data.tile_overlap={overlap}: windows of {smallest} px can share 0 to "
            f"{smallest - 1}"
        )


def _check_tracks(data: ConfigDict) -> None:
    """Raises ValueError for fields of the cross-domain tracks that do nothing or do not fit."""
    if len(set(data.join)) < len(data.join):
        raise ValueError(f"--config.data.join={data.join}: give different ones")
    if data.join and data.protocol == "one_for_all":
        raise ValueError("--config.data.join: joined data sets take protocol one_class or a track")
    if data.labelled and data.protocol != "track_b":
        raise ValueError("--config.data.labelled: only protocol=track_b has labelled defects")
    if data.held_out and data.protocol != "track_b":
        raise ValueError("--config.data.held_out: only protocol=track_b holds combinations out")
