"""mmrjax: one command with a verb for each program; `python -m mmrjax` is the same.

    mmrjax train <folder of good parts>     trains on it; verdicts, threshold and a report follow
    mmrjax predict <images>                 scores them with the latest run

Arguments are parsed before JAX is imported, so that help and errors come at once. The programs
themselves stay what they are: `python -m mmrjax.main --config=…` and the others.
"""

import importlib
import os
import sys

import mmrjax


def _leave_working_directory() -> None:
    """Takes the working directory, which `python -m` puts first, off the path of imports.

    A file of the user's, such as tree.py, would otherwise stand for a library of that name. If the
    package itself lies there, as in a clone, its own folders are found before the path changes.
    """
    if not sys.path or sys.path[0] not in ("", os.getcwd()):
        return
    importlib.import_module("data_builders")

    here = sys.path.pop(0) or os.getcwd()
    if os.path.dirname(os.path.dirname(os.path.abspath(mmrjax.__file__))) == here:
        sys.path.append(here)


if __name__ == "__main__":
    _leave_working_directory()

import ast
import difflib
import pathlib
from collections.abc import Callable, Sequence

from mmrjax.runs import arguments, places
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import fields

USAGE = 2  # the exit status of a wrong command, as argparse's


class Wrong(Exception):
    """A wrong command, in words for its user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else USAGE
    if argv[0] in ("-V", "--version", "version"):
        print(mmrjax.__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"
            raise Wrong(f"mmrjax {verb}: no such verb; {hint}")
        program = VERBS[verb][0](rest)
    except (Wrong, ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        return USAGE
    return program()


def _overview() -> str:
    lines = [f"mmrjax {mmrjax.__version__}: finds defects, trained on pictures of good parts", ""]
    lines += [f"  mmrjax {verb:9}{about}" for verb, (_, about) in VERBS.items()]
    return "\n".join([*lines, "", "mmrjax <verb> --help tells the arguments of a verb."])


Program = Callable[[], int]


def _program(module: str, argv: Sequence[str]) -> Program:
    """A call of the `main` of a module, which is imported by the call."""
    return lambda: importlib.import_module(module).main([*argv])


def _train(argv: Sequence[str]) -> Program:
    return _program("mmrjax.main", arguments.parse_train(argv))


def _predict(argv: Sequence[str]) -> Program:
    own = arguments.parse_predict(argv, "mmrjax predict")
    if own.calibration is not None and not own.calibration.is_file():
        raise FileNotFoundError(f"--calibration={own.calibration}: no such file")
    places.run(own.workdir)
    return _program("mmrjax.predict.__main__", argv)


def _report(argv: Sequence[str]) -> Program:
    places.workdir(arguments.parse_report(argv, "mmrjax report").workdir)
    return _program("mmrjax.report.__main__", argv)


def _compare(argv: Sequence[str]) -> Program:
    own = arguments.parse_compare(argv, "mmrjax compare")
    for given in (own.first, own.second):
        places.groups(given)
    return _program("mmrjax.compare", argv)


def _export(argv: Sequence[str]) -> Program:
    places.run(arguments.parse_export(argv, "mmrjax export").workdir)
    return _program("mmrjax.export.__main__", argv)


def _convert(argv: Sequence[str]) -> Program:
    arguments.parse_convert(argv, "mmrjax convert")
    return _program("mmrjax.convert", argv)


def _bench(argv: Sequence[str]) -> Program:
    arguments.parse_bench(argv, "mmrjax bench")
    return _program("mmrjax.bench.__main__", argv)


def _check(argv: Sequence[str]) -> Program:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: mmrjax check <folder>, or mmrjax check <data set> --raw_dir=<folder>")
        return lambda: 0 if argv else USAGE
    if pathlib.Path(argv[0]).is_dir():
        argv = ["folder", f"--raw_dir={argv[0]}", *argv[1:]]
    return _program("data_builders.check", argv)


def _configs(argv: Sequence[str]) -> Program:
    if {"-h", "--help"} & {*argv}:
        print("usage: mmrjax configs [name]: all configurations, or the fields of one")
        return lambda: 0
    if len(argv) > 1:
        raise Wrong(f"mmrjax configs takes one name, not {len(argv)}")
    if argv:
        path = config_lib.find(argv[0].partition(":")[0])
        return lambda: print(_fields_of(argv[0], path)) or 0
    return lambda: print(_all_configurations()) or 0


def _all_configurations() -> str:
    lines = []
    for path in config_lib.packaged():
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"{path.stem:18}{about.partition(chr(10))[0]}")
    return "\n".join([*lines, "", "mmrjax configs <name> lists the fields of one."])


def _fields_of(spec: str, path: pathlib.Path) -> str:
    """A block for each group: every field with its value, its comment and its source."""
    values = config_lib.flatten(config_lib.load(spec))
    known, own = fields.declared(), fields.changed(path)
    lines, before = [f"{path}: --config.<field>=<value> changes one"], ""
    for name in sorted(values, key=lambda name: (name.rpartition(".")[0], name)):
        group = name.rpartition(".")[0]
        lines += [""] if group != before else []
        before = group
        default = known.get(name)
        source = own.get(name, default)
        comment = (source and source.comment) or (default and default.comment) or ""
        line = f"{name} = {values[name]!r}"
        about = f"{comment}  [{source.place}]" if source else comment
        lines.append(f"{line:44}  # {about.strip()}".rstrip(" #"))
    return "\n".join(lines)


# {verb: (arguments -> the program that they start, what the verb does)}
VERBS: dict[str, tuple[Callable[[Sequence[str]], Program], str]] = {
    "train": (_train, "trains on a folder of good parts, or by a configuration, and reports"),
    "predict": (_predict, "scores images, folders or a video: verdicts, boxes, heat maps"),
    "report": (_report, "writes the report of a work directory anew"),
    "compare": (_compare, "by how much one run is better than another, and how sure that is"),
    "export": (_export, "writes a run's scorer as one file: .jax or .onnx"),
    "convert": (_convert, "weights between PyTorch and mmrjax"),
    "bench": (_bench, "speed and memory on this machine"),
    "check": (_check, "names every odd file of a folder, and what a training does with it"),
    "configs": (_configs, "lists the configurations, or the fields of one"),
}


if __name__ == "__main__":
    sys.exit(main())
