"""The command lines of all programs: parsed before JAX is imported.

A wrong command is answered within a second. The programs and `mmrjax <verb>` share these parsers.
"""

import argparse
import importlib.util
import pathlib
from collections.abc import Sequence

from mmrjax.runs import places
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import fields, files

SUFFIXES = {".jax": ("flatbuffers",), ".onnx": ("torch", "onnx", "onnxscript", "onnxruntime")}
EXTRAS = {".jax": "export", ".onnx": "onnx"}
BENCH_PARTS = ("train", "evaluate", "latency")
BENCH_NUMBERS = {"windows": 5, "window_seconds": 2.0, "requests": 200, "images": 64}
CONVERT_EXAMPLES = """
kinds
  teacher  a ResNet with torchvision's names (stem and layers 1-3; layer4 and fc are not used),
           or a frozen ViT with its authors' or timm's names (heads are not used)
  mae      a MAE checkpoint, {"model": state}: the encoder; the decoder is dropped
  mae_whole  the same with its decoder (mae_visualize_vit_*.pth), or a run's own autoencoder
  timm     a timm ViT-*/16: the encoder; the classifier's head is dropped; MAE's is refused
  mmr      a whole MMR student with the official names

examples
  python -m mmrjax.convert from-torch --kind=mae --arch=base \\
      --input=mae_visualize_vit_base.pth --output=mae_base.safetensors
  python -m mmrjax.convert to-torch --kind=mmr \\
      --input=runs/mine/mmr/parts/seed54 --output=student.safetensors
  python -m mmrjax.convert to-torch --kind=teacher \\
      --input=runs/mine/mmr/parts/seed54 --output=teacher.safetensors

An existing output is refused, never replaced; a new one appears whole or not at all.
"""
RUN = "a run, a folder with one run in it, or a data set's name; the latest in runs/ if absent"


def train(prog: str, **options) -> argparse.ArgumentParser:
    """The parser of a training; --config.<group>.<field>=<value> are left to the caller."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train, evaluate and report. Fields: --config.<group>.<field>=<value>.",
        allow_abbrev=False,
        **options,
    )
    parser.add_argument("--config", help="configs/<name>.py[:argument], or its name")
    parser.add_argument(
        "--workdir",
        type=places.address,
        help="holds all of a run; may be gs://…; by default runs/<name of the configuration>",
    )
    parser.add_argument("--mode", default="train", choices=("train", "evaluate"))
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--coordinator", help="host:port of the first process, where not detected")
    parser.add_argument("--num_processes", type=int, help="where not detected")
    parser.add_argument("--process_id", type=int, help="of this one, from 0; where not detected")
    return parser


def parse_train(argv: Sequence[str]) -> list[str]:
    """The arguments of mmrjax.main that `mmrjax train` stands for.

    Raises:
      ValueError, FileNotFoundError: an unknown field, configuration or folder.
    """
    parser = train("mmrjax train", usage="mmrjax train <folder> [options]")
    parser.add_argument("folder", nargs="?", help="good parts, or the name of a configuration")
    parser.add_argument("--method", help="auto, or names, as --config.method.names")
    given = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    own = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    fields.check(given)
    known = ["auto", *fields.constants("name")]
    for name in own.method.split(",") if own.method else ():
        if name not in known:
            raise ValueError(f"--method={name}: unknown; known: {', '.join(known)}")
    rest = [f"--mode={own.mode}", *(["--distributed"] if own.distributed else [])]
    for name in ("coordinator", "num_processes", "process_id"):
        if (value := getattr(own, name)) is not None:
            rest.append(f"--{name}={value}")
    return [*training(own.folder, own.config, own.workdir, own.method, given), *rest]


def training(
    folder: str | None,
    config: str | None = None,
    workdir: str | None = None,
    method: str | None = None,
    given: Sequence[str] = (),
) -> list[str]:
    """The arguments of mmrjax.main for a folder of parts or the name of a configuration.

    Args:
      folder: good parts in any layout of the data set `folder`, or a configuration.
      config: a configuration; folder by default.
      workdir: by default runs/<name of the folder>.
      method: method.names; "auto" for a folder.
      given: "group.field=value" each, which win.

    Raises:
      ValueError, FileNotFoundError: no such folder or configuration.
    """
    named = {text.partition("=")[0] for text in given}
    added = []
    if folder is not None and not pathlib.Path(folder).is_dir():
        try:
            config_lib.find(folder.partition(":")[0])
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{folder}: no such folder; nor a configuration: {e}") from e
        if config is not None:
            raise ValueError(f"{folder} and --config={config}: give one of the two")
        config, folder = folder, None
    if folder is not None:
        added.append(f"data.raw_dir={folder}")
        method = "auto" if method is None and config is None else method
        workdir = workdir or f"{places.ROOT}/{pathlib.Path(folder).resolve().name}"
    elif config is None:
        raise ValueError("nothing to train on: mmrjax train <folder of good parts>")
    config = config or "folder"
    config_lib.find(config.partition(":")[0])
    if method is not None:
        added.append(f"method.names={method}")
    added = [text for text in added if text.partition("=")[0] not in named]
    flags = [f"--config={config}", *([f"--workdir={workdir}"] if workdir else [])]
    return [*flags, *(f"--config.{text}" for text in (*added, *given))]


def _parser(prog: str, description: str, **options) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog, description=description, allow_abbrev=False, **options
    )


def predict(prog: str = "python -m mmrjax.predict") -> argparse.ArgumentParser:
    """The parser of mmrjax.predict."""
    parser = _parser(prog, "Scores images or a video with a trained run.")
    parser.add_argument("images", nargs="*", help="images, folders, quoted globs, or a video")
    parser.add_argument("--workdir", type=places.address, help=RUN)
    parser.add_argument("--input", help="an image, a folder, a quoted glob or a video")
    parser.add_argument(
        "--output", default="predicted", type=files.local_path, help="folder to write into"
    )
    parser.add_argument("--raw_maps", choices=("npy", "tiff"), help="also write float32 maps")
    parser.add_argument("--no_pictures", action="store_true", help="only scores")
    parser.add_argument("--target_fpr", type=float, help="false-positive rate of the threshold")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--recalibrate", help="good images that the threshold is taken from")
    other.add_argument("--calibration", type=files.local_path, help="a calibration.json to use")
    parser.add_argument("--full_scale", type=int, default=0, help="white of 16-bit images")
    return parser


def parse_predict(
    argv: Sequence[str] | None, prog: str = "python -m mmrjax.predict"
) -> argparse.Namespace:
    """Parses the command line of mmrjax.predict; `images` holds all that is to be scored."""
    parser = predict(prog)
    arguments = parser.parse_args(argv)
    if arguments.input is not None:
        arguments.images = [*arguments.images, arguments.input]
    if not arguments.images and arguments.recalibrate is None:
        parser.error("no image is given: name images, folders or a video (or use --input)")
    if arguments.full_scale < 0:
        parser.error(f"--full_scale={arguments.full_scale}: a grey level such as 4095 or 65535")
    return arguments


def parse_export(
    argv: Sequence[str] | None, prog: str = "python -m mmrjax.export"
) -> argparse.Namespace:
    """Parses the command line of mmrjax.export; refuses a file of unknown kind or without extra."""
    parser = _parser(prog, "Writes the scorer of a run as a serialised JAX program or as ONNX.")
    parser.add_argument("run", nargs="?", help=RUN)
    parser.add_argument("--workdir", type=places.address, help="the same")
    parser.add_argument(
        "--output", required=True, type=files.local_path, help="scorer.jax or scorer.onnx"
    )
    parser.add_argument("--images", help="folder of images to compare on; otherwise noise")
    parser.add_argument("--target_fpr", type=float, help="false-positive rate of the threshold")
    parser.add_argument(
        "--calibration", type=files.local_path, help="a calibration.json of predict to use"
    )
    arguments = _with_run(parser, argv)
    try:
        check_kind(arguments.output)
    except ValueError as e:
        parser.error(f"--output={e}")
    return arguments


def check_kind(path: pathlib.Path) -> None:
    """Raises ValueError if no exported file ends so, or if its packages are not installed."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: a name that ends in {' or '.join(SUFFIXES)} says which kind of file is "
            "written"
        )
    packages = SUFFIXES[path.suffix]
    if lacking := [name for name in packages if importlib.util.find_spec(name) is None]:
        extra = EXTRAS[path.suffix]
        raise ValueError(f"{path}: needs {', '.join(lacking)}: pip install 'mmrjax[{extra}]'")


def parse_report(
    argv: Sequence[str] | None, prog: str = "python -m mmrjax.report"
) -> argparse.Namespace:
    """Parses the command line of mmrjax.report."""
    parser = _parser(prog, "Renders the report of a work directory anew.")
    parser.add_argument("run", nargs="?", help="a work directory or a run in it; the latest")
    parser.add_argument("--workdir", type=places.address, help="the same")
    return _with_run(parser, argv)


def _with_run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = parser.parse_args(argv)
    if arguments.run and arguments.workdir:
        parser.error(f"{arguments.run} and --workdir={arguments.workdir}: give one of the two")
    arguments.workdir = arguments.workdir or arguments.run
    return arguments


def parse_compare(
    argv: Sequence[str] | None, prog: str = "python -m mmrjax.compare"
) -> argparse.Namespace:
    """Parses the command line of mmrjax.compare."""
    parser = _parser(prog, "Compare two finished runs on the same test images, paired.")
    for name in ("first", "second"):
        parser.add_argument(
            name, type=places.address, help="<workdir>/<method>/<category>, or a work directory"
        )
    return parser.parse_args(argv)


def parse_convert(
    argv: Sequence[str] | None, prog: str = "python -m mmrjax.convert"
) -> argparse.Namespace:
    """Parses the command line of mmrjax.convert."""
    parser = _parser(
        prog,
        "Weights between PyTorch and mmrjax.",
        epilog=CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = sorted({"teacher", "mae", "timm", *fields.constants("official")})
    parser.add_argument("verb", choices=("from-torch", "to-torch"))
    parser.add_argument("--kind", required=True, choices=kinds)
    parser.add_argument(
        "--arch",
        default="",
        help="a teacher.name, a student.size or WIDTH,DEPTH,HEADS. Optional if a file or run "
        "states it, as all of mmrjax do",
    )
    parser.add_argument(
        "--input", required=True, type=places.address, help="a file or a run, or gs://…"
    )
    parser.add_argument("--output", required=True, type=_home, help="a file, not yet there")
    return parser.parse_args(argv)


def _home(text: str) -> pathlib.Path:
    """With ~ as the home folder: shells leave it alone behind an equals sign."""
    return files.local_path(text).expanduser()


def parse_bench(
    argv: Sequence[str] | None, prog: str = "python -m mmrjax.bench"
) -> argparse.Namespace:
    """Parses the command line of mmrjax.bench; `overrides` are the fields of the configuration."""
    parser = _parser(prog, "Speed and memory of a method on this machine.")
    parser.add_argument("--config", default="configs/magnetic_tile.py")
    parser.add_argument("--train_batches", type=_numbers, default=(16,), help="as 16,32")
    parser.add_argument("--eval_batches", type=_numbers, default=(1, 32))
    for name, default in BENCH_NUMBERS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument(
        "--parts", type=_words, default=BENCH_PARTS, help=f"of {', '.join(BENCH_PARTS)}"
    )
    parser.add_argument("--vs", choices=("torch",), help="compare with PyTorch (torch extra)")
    parser.add_argument("--variants", type=_words, default=(), help="ways to run PyTorch")
    parser.add_argument("--json", type=files.local_path, help="file for all numbers")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args(argv)
    arguments.overrides = [o.removeprefix("--config.") for o in overrides]
    if unknown := [o for o in overrides if not o.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]!r}")
    if min(getattr(arguments, name) for name in BENCH_NUMBERS) <= 0:
        parser.error(f"--{', --'.join(BENCH_NUMBERS)} must be positive")
    if wrong := [part for part in arguments.parts if part not in BENCH_PARTS]:
        parser.error(f"--parts={wrong[0]}: known are {', '.join(BENCH_PARTS)}")
    if arguments.vs and importlib.util.find_spec("torch") is None:
        parser.error("--vs=torch needs torch: pip install 'mmrjax[torch]'")
    return arguments


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(",") if n)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers, as 16,32") from e


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)
