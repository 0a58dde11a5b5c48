"""Configuration files and command-line overrides, with errors that say what to type instead.

`configs/<name>.py[:argument]` is looked up in the working directory, then in the installed package.
`--config.group.field=value` overrides a field; values are parsed by the type of the default.
"""

import ast
import difflib
import importlib.util
import inspect
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

import configs


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
    config = get_config(argument) if argument else get_config()
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"--config.{name}: give a value, as in --config.{name}=…")
        _set(config, name, text)
    return config


def _find(path: str) -> pathlib.Path:
    given = pathlib.Path(path)
    packaged = pathlib.Path(configs.__file__).parent
    for candidate in (given, packaged / given.name):
        if candidate.is_file():
            return candidate
    known = sorted(f"configs/{p.name}" for p in packaged.glob("*.py") if p.stem != "__init__")
    known.remove("configs/common.py")
    raise FileNotFoundError(f"no configuration file {path!r}; available: {', '.join(known)}")


def _import(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config()")
    return module


def flatten(config: ConfigDict) -> dict[str, object]:
    """{"group.field": value} of every field, in order of definition."""
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
        raise ValueError(f"--config.{name}: no such field; {_nearest(name, list(flat))}")
    value = _parse(name, text, flat[name])
    *groups, field = name.split(".")
    for group in groups:
        config = config[group]
    config[field] = value


def _nearest(name: str, known: list[str]) -> str:
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
        return _parse_tuple(text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as e:
        raise wrong from e
    if isinstance(default, float) and type(value) in (int, float):
        return float(value)
    if type(value) is not type(default):
        raise wrong
    return value


def _parse_tuple(text: str) -> tuple:
    """`54,55`, `(54, 55)`, `mmr,patchcore` and a single `54` alike; "" and "()" are empty."""
    parts = [part.strip().strip("'\"") for part in text.strip("()[] ").split(",")]

    def item(part: str) -> object:
        try:
            return ast.literal_eval(part)
        except (ValueError, SyntaxError):
            return part

    return tuple(item(part) for part in parts if part)


def validate(config: ConfigDict) -> None:
    """Raises ValueError for values that cannot work, before anything is computed."""
    choices = {
        "data.protocol": ("one_class", "image_split"),
        "data.interpolation": ("bilinear", "bicubic", "lanczos"),
        "data.feed": ("auto", "resident", "stream"),
        "train.augment": ("rrc_flip", "rrc", "none"),
        "train.compute_dtype": ("auto", "float32", "bfloat16"),
        "eval.metrics_mode": ("standard", "mmr"),
        "patchcore.score": ("smoothed", "patch"),
    }
    flat = flatten(config)
    for name, known in choices.items():
        if flat[name] not in known:
            raise ValueError(f"--config.{name}={flat[name]}: choose one of {', '.join(known)}")
    for name in ("train.epochs", "train.batch_size", "eval.batch_size", "ckpt.keep"):
        if flat[name] < 1:
            raise ValueError(f"--config.{name}={flat[name]}: must be at least 1")
    for name in ("data.image_size", "data.resize", "eval.resize"):
        value = flat[name]
        optional = name == "eval.resize" and not value
        if not optional and (len(value) != 2 or not all(isinstance(n, int) for n in value)):
            raise ValueError(f"--config.{name}={value}: expected height,width such as 224,224")
    for name in ("data.resize", "eval.resize"):
        if flat[name] and any(
            r < s for r, s in zip(flat[name], flat["data.image_size"], strict=True)
        ):
            raise ValueError(
                f"--config.{name}={flat[name]}: smaller than data.image_size="
                f"{flat['data.image_size']}, which is cropped from it"
            )
    if not 0 <= config.student.mask_ratio < 1:
        raise ValueError(f"--config.student.mask_ratio={config.student.mask_ratio}: not in [0, 1)")
    if not config.train.seeds or not all(isinstance(s, int) for s in config.train.seeds):
        raise ValueError(f"--config.train.seeds={config.train.seeds}: expected integers: 54,55,56")
