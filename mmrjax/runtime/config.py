"""Configuration files and command-line overrides, with errors that say what to type instead.

`configs/<name>.py[:argument]` is looked up in the working directory, then in the installed package.
`--config.group.field=value` overrides a field; values are parsed by the type of the default.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import itertools
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from data_builders import buckets
from mmrjax.runtime import files

PACKAGED = pathlib.Path(__file__).resolve().parents[2] / "configs"


# Types of the entries of tuples that are empty by default.
TUPLES = {
    "data.categories": str,
    "data.join": str,
    "data.held_out": str,
    "mmr_plus.surfaces": str,
    "eval.resize": int,
    "aminet.drops": float,
    "log.trackers": str,
}
SMALLEST_SCALED = 32  # px of an image that patchcore.scales shrinks: two cells of layer 3
RENAMED = {"patchcore.enlarge": "patchcore.scales"}
PROTOCOLS = ("one_class", "k_shot", "one_for_all", "image_split", "track_a", "track_b")
# Smallest and largest value of a field, or of every entry of a tuple.
RANGES = (
    ("optim.warmup", 0.0, 1.0),  # shares of train.epochs, not epochs
    ("optim.drops", 0.0, 1.0),
    ("optim.learning_rate", 0.0, 10.0),
    ("student.mask_ratio", 0.0, 0.99),
    ("student.mask_unit", 1, 1 << 20),
    ("student.layers", 1, 3),
    ("patchcore.layers", 1, 3),
    ("patchcore.coreset", 1e-6, 1.0),  # a share, not percent
    ("patchcore.candidates", 0, 1 << 40),
    ("patchcore.scales", 0.1, 8.0),
    ("patchcore.whiten", 0.0, 1e6),
    ("aminet.layers", 1, 3),
    ("aminet.pool", 1, 1 << 10),
    ("aminet.patch", 1, 1 << 10),
    ("aminet.width", 4, 1 << 20),
    ("aminet.heads", 1, 1 << 10),
    ("aminet.depth", 1, 1 << 10),
    ("aminet.cluster_depth", 1, 1 << 10),
    ("aminet.clusters", 2, 1 << 20),  # the spread of a single centre is 0 / 0
    ("aminet.boundary", -1e9, 1e9),  # a large one hides nothing
    ("aminet.jitter", 0.0, 1e6),
    ("aminet.learning_rate", 0.0, 10.0),
    ("aminet.warmup", 0.0, 1.0),
    ("aminet.drops", 0.0, 1.0),
    ("mmr_plus.local_heads", 0.0, 1.0),
    ("mmr_plus.window", 1, 1 << 10),
    ("mmr_plus.stride", 1, 1 << 10),
    ("mmr_plus.soft_start", 0.0, 0.9),  # the last epochs train what is evaluated
    ("mmr_plus.synthetic_every", 0, 1 << 10),
    ("mmr_plus.defect_tiny", 0.0, 1.0),
    ("mmr_plus.defect_labelled", 0.0, 1.0),
    ("mmr_plus.noise_intensity", 0.0, 1.0),
    ("mmr_plus.tiny_weight", 1.0, 1e3),
    ("mmr_plus.contrast_weight", 0.0, 1e3),
    ("mmr_plus.negatives", 0, 1 << 10),
    ("mmr_plus.alike", -1.0, 1.0),
    ("mmr_plus.temperature", 1e-3, 1e3),
    ("mmr_plus.domain_weight", 0.0, 1e3),
    ("mmr_plus.ramp", 0.0, 1.0),
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
    ("eval.bootstrap", 0, 1 << 20),
    ("eval.tiny_side", 2, 1 << 16),
    ("report.gallery", 0, 1 << 20),
    ("ckpt.every_seconds", 0.0, 1e9),
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
    get_config = _import(_find(path)).get_config
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


def _find(path: str) -> pathlib.Path:
    given, packaged = pathlib.Path(path), PACKAGED
    if given.is_file():
        return given
    if str(given.parent) in (".", "configs") and (packaged / given.name).is_file():
        return packaged / given.name
    known = sorted(f"configs/{p.name}" for p in packaged.glob("*.py") if p.stem != "__init__")
    known.remove("configs/common.py")
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

    What it raises as ValueError is meant for people and stays as it is.
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
            hint = _nearest(name, list(wanted))
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


def flatten_stored(content: dict) -> dict[str, object]:
    """`flatten` of what a run's config.json holds, under the names of today."""
    flat = flatten(ConfigDict(content))
    if "patchcore.scales" not in flat and "patchcore.enlarge" in flat:  # one number
        flat["patchcore.scales"] = (flat["patchcore.enlarge"],)
    return flat


def _set(config: ConfigDict, name: str, text: str) -> None:
    flat = flatten(config)
    if name not in flat:
        raise ValueError(f"--config.{name}: no such field; {_nearest(name, list(flat))}")
    if name == "sweep.rows":
        raise ValueError(f"--config.{name}: only a file declares it, see configs/aebad_ablation.py")
    value = _parse(name, text, flat[name])
    *groups, field = name.split(".")
    for group in groups:
        config = config[group]
    config[field] = value


def _nearest(name: str, known: list[str]) -> str:
    if name in RENAMED:
        return f"it is {RENAMED[name]} now"
    by_leaf = [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
    near = by_leaf or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    group = name.split(".")[0]
    inside = [k for k in known if k.startswith(f"{group}.")]
    return f"known: {', '.join(inside or sorted({k.split('.')[0] for k in known}))}"


def _parse(name: str, text: str, default: object) -> object:
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
    kind = type(default[0]) if default else TUPLES[name]
    parts = [part.strip().strip("'\"") for part in text.strip("()[] ").split(",")]
    try:
        return tuple(kind(part) for part in parts if part)
    except ValueError as e:
        example = default or (kind(1),)
        raise ValueError(f"--config.{name}={text}: expected values such as {example!r}") from e


def validate(config: ConfigDict) -> None:
    """Raises ValueError for values that cannot work, before anything is computed."""
    choices = {
        "data.protocol": PROTOCOLS,
        "data.interpolation": ("bilinear", "bicubic", "lanczos"),
        "data.feed": ("auto", "resident", "stream"),
        "student.mask_form": ("drop", "pixel"),
        "train.augment": ("rrc_flip", "rrc", "none"),
        "aminet.augment": ("rrc_flip", "rrc", "none"),
        "aminet.score": ("std", "max"),
        "mmr_plus.heads": ("auto", "fixed", "by_distance"),
        "mmr_plus.sampling": ("lattice", "random", "full"),
        "mmr_plus.layers": ("all", "last_half", "alternate"),
        "mmr_plus.spatial_distribution": ("uniform", "edge", "texture"),
        "mmr_plus.foreground": ("all", "otsu"),
        "mmr_plus.tiny_mode": ("literal", "balanced"),
        "mmr_plus.labelled_target": ("blend", "inpaint", "ignore"),
        "mmr_plus.contrast": ("features", "tokens", "none"),
        "mmr_plus.domain": ("supcon", "coral", "none"),
        "train.compute_dtype": ("auto", "float32", "bfloat16"),
        "eval.stress": ("none", "dark"),
        "eval.metrics_mode": ("standard", "mmr"),
        "eval.pixel_metrics": ("auto", "exact", "streaming"),
        "patchcore.score": ("smoothed", "patch"),
        "sweep.average": ("domains", "images"),
    }
    flat = flatten(config)
    for name, known in choices.items():
        if flat[name] not in known:
            raise ValueError(f"--config.{name}={flat[name]}: choose one of {', '.join(known)}")
    places = [name for name in flat if name.startswith("raw_dirs.")]
    for name in ("data.raw_dir", "mmr_plus.defect_folder", *places):
        if buckets.is_remote(flat[name]):
            raise ValueError(f"--config.{name}={flat[name]}: {files.LOCAL_ONLY}")
    folder = flat["mmr_plus.defect_folder"]
    if folder and not pathlib.Path(folder).is_dir():
        raise ValueError(f"--config.mmr_plus.defect_folder={folder}: there is no such folder")
    if buckets.is_remote(flat["data.data_dir"]):
        buckets.check(flat["data.data_dir"])
    _check_tracks(flat)
    batches = ("train.batch_size", "aminet.batch_size", "eval.batch_size")
    for name in ("train.epochs", "aminet.epochs", *batches, "ckpt.keep"):
        if flat[name] < 1:
            raise ValueError(f"--config.{name}={flat[name]}: must be at least 1")
    for name, low, high in RANGES:
        values = flat[name] if isinstance(flat[name], tuple) else (flat[name],)
        if not all(low <= value <= high for value in values):
            raise ValueError(f"--config.{name}={flat[name]}: must lie between {low} and {high}")
    for name, length in (("train.crop_scale", 2), ("train.crop_ratio", 2), ("mmr_plus.ramp", 2)):
        if len(flat[name]) != length or flat[name][0] > flat[name][1]:
            raise ValueError(f"--config.{name}={flat[name]}: expected smallest,largest")
    for name in ("aminet.pool", "mmr_plus.window"):
        if flat[name] % 2 == 0:
            raise ValueError(f"--config.{name}={flat[name]}: must be odd, as 1 or 3")
    layers = ("student.layers", "patchcore.layers", "aminet.layers")
    for name in (*layers, "train.seeds", "method.names", "mmr_plus.defect_kinds"):
        if not flat[name] or len(set(flat[name])) < len(flat[name]):
            raise ValueError(f"--config.{name}={flat[name]}: give one or more different values")
    for name in ("data.image_size", "data.resize", "eval.resize"):
        value = flat[name]
        optional = name == "eval.resize" and not value
        if not optional and (len(value) != 2 or min(value) < 1):
            raise ValueError(f"--config.{name}={value}: expected height,width such as 224,224")
    _check_scales(flat)
    overlap, smallest = flat["data.tile_overlap"], min(flat["data.image_size"])
    if flat["data.tiling"] and not 0 <= overlap < smallest:
        raise ValueError(
            f"--config.data.tile_overlap={overlap}: windows of {smallest} px can share 0 to "
            f"{smallest - 1}"
        )
    for name in ("data.resize", "eval.resize"):
        if flat[name] and any(
            r < s for r, s in zip(flat[name], flat["data.image_size"], strict=True)
        ):
            raise ValueError(
                f"--config.{name}={flat[name]}: smaller than data.image_size="
                f"{flat['data.image_size']}, which is cropped from it"
            )


def _check_scales(flat: dict) -> None:
    scales, side = flat["patchcore.scales"], min(flat["data.image_size"])
    if not scales or any(a >= b for a, b in itertools.pairwise(scales)):
        raise ValueError(
            f"--config.patchcore.scales={scales}: give one or more, each larger than the one before"
        )
    if scales[0] < 1 and scales[0] * side < SMALLEST_SCALED:
        raise ValueError(
            f"--config.patchcore.scales={scales}: {scales[0]:g} of data.image_size leaves "
            f"{scales[0] * side:g} px, and the teacher needs {SMALLEST_SCALED}; give a larger one"
        )


def _check_tracks(flat: dict) -> None:
    """Raises ValueError for fields of the cross-domain tracks that do nothing or do not fit."""
    names, protocol = flat["data.join"], flat["data.protocol"]
    if len(set(names)) < len(names):
        raise ValueError(f"--config.data.join={names}: give different ones")
    if names and protocol == "one_for_all":
        raise ValueError("--config.data.join: joined data sets take protocol one_class or a track")
    if flat["data.labelled"] and protocol != "track_b":
        raise ValueError("--config.data.labelled: only protocol=track_b has labelled defects")
    if flat["data.held_out"] and protocol != "track_b":
        raise ValueError("--config.data.held_out: only protocol=track_b holds combinations out")
