"""Trains, evaluates, reports: python -m mmrjax.main --config=configs/demo.py --workdir=runs/demo.

Every command can be repeated: what is finished is not done again, and a killed run continues where
its last checkpoint was. Runs lie in <workdir>/<method>/<category>/seed<k>/ (the method first, so
that several methods share one work directory and one report); another view of finished runs lies in
<workdir>/evaluations/<view>/.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
from absl import logging
from ml_collections import ConfigDict

from data_builders import build
from mmrjax import aggregate, evaluate, logs, methods, report, train
from mmrjax import config as config_lib
from mmrjax.data import records as records_lib
from mmrjax.data import splits

# What may change between two calls on one work directory without touching what was trained.
FREE_FIELDS = (
    "title",
    "method.names",
    "data.raw_dir",
    "data.data_dir",
    "data.categories",
    "data.feed",
    "data.resident_gib",
    "data.reference_domain",
    "train.seeds",
    "train.steps_per_call",
    "eval.",
    "report.",
    "ckpt.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    started = time.monotonic()
    logs.setup()
    try:
        config, arguments = parse(sys.argv[1:] if argv is None else argv)
        config_lib.validate(config)
        _use_compile_cache()
        results, report_path = run_all(config, arguments.workdir, arguments.mode)
    except train.Interrupted as e:
        print(f"{e}; the same command continues", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError, FloatingPointError, RuntimeError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(results_table(results))
    print(f"\nreport: {report_path} ({time.monotonic() - started:.0f} s)")
    return 0


def parse(argv: Sequence[str]) -> tuple[ConfigDict, argparse.Namespace]:
    """Parses the command line.

    Raises:
      ValueError: an unknown flag, a stray argument or a bad override, with what to type instead.
      FileNotFoundError: no such configuration.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mmrjax.main",
        description="Train, evaluate and report. Fields: --config.<group>.<field>=<value>.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", required=True, help="configs/<name>.py[:argument]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="holds all of a run")
    parser.add_argument("--mode", default="train", choices=("train", "evaluate"))
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    rest = [a for a in argv if not a.startswith("--config.")]
    if not {"-h", "--help"} & set(rest):
        for flag in ("--config", "--workdir"):
            if not any(a == flag or a.startswith(f"{flag}=") for a in rest):
                raise ValueError(f"{flag} is missing; try {parser.prog} --config=configs/demo.py "
                                 "--workdir=runs/demo")  # fmt: skip
    try:
        arguments, unknown = parser.parse_known_args(rest)
    except argparse.ArgumentError as e:
        raise ValueError(str(e)) from e
    if unknown:
        raise ValueError(
            f"unknown argument {unknown[0]!r}; known: --config, --workdir, --mode and "
            "--config.<group>.<field>=<value>"
        )
    return config_lib.load(arguments.config, overrides), arguments


def run_all(config: ConfigDict, workdir: pathlib.Path, mode: str) -> tuple[dict, pathlib.Path]:
    """Every method, category and seed in turn; then the aggregate and the report."""
    logging.info("jax %s on %s", jax.__version__, jax.devices())
    for name in config.method.names:
        if name not in methods.METHODS:
            raise ValueError(
                f"--config.method.names={name}: unknown; known: {sorted(methods.METHODS)}"
            )
    directories = build.build(
        config.data.name,
        config.data.raw_dir or None,
        config.data.data_dir,
        list(config.data.categories) or None,
    )
    root = results_root(config, workdir)
    for category, directory in directories.items():
        records = records_lib.load(directory)
        for name in config.method.names:
            for seed in config.train.seeds:
                run = workdir / name / category / f"seed{seed}"
                folder = root / name / category / f"seed{seed}"
                run_one(config, name, records, seed, run, folder, mode)
    results = aggregate.aggregate(root, config.title, config.data.reference_domain)
    return results, report.write_report(root)


def run_one(
    config: ConfigDict,
    name: str,
    records: records_lib.Records,
    seed: int,
    run: pathlib.Path,
    folder: pathlib.Path,
    mode: str,
) -> None:
    """Trains and evaluates one method on one category with one seed, unless that is done."""
    finished = _read_json(folder / "results.json")
    check_same_training(config, name, run, mode)
    if finished and finished["facts"].get("eval") == evaluate.eval_fields(config):
        logging.info("%s: finished before, see %s", run, folder / "results.json")
        return
    train_rows, test_rows = splits.select(records, config.data.protocol)
    trained = train.train(
        config, name, records, train_rows, seed, run, evaluate_only=mode == "evaluate"
    )
    if folder != run:  # another view: the report there shows the same training
        for file in ("config.json", "metrics.jsonl"):
            if (run / file).exists():
                evaluate.write_text(folder / file, (run / file).read_text())
    evaluate.evaluate(trained, records, test_rows, config, seed, folder)


def results_root(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """The work directory, or a folder in it for a view or a mode other than the trained one."""
    parts = []
    if config.eval.resize and tuple(config.eval.resize) != tuple(config.data.resize):
        parts.append("resize{}x{}".format(*config.eval.resize))
    if config.eval.metrics_mode != "standard":
        parts.append(f"metrics_{config.eval.metrics_mode}")
    return workdir / "evaluations" / "-".join(parts) if parts else workdir


def check_same_training(config: ConfigDict, name: str, run: pathlib.Path, mode: str) -> None:
    """Compares with the run's config.json, or writes it.

    Raises:
      ValueError: fields that change what is trained differ, naming them.
      FileNotFoundError: nothing was trained there and `mode` is "evaluate".
    """
    flat = json.loads(json.dumps(config_lib.flatten(config)))
    path = run / "config.json"
    stored = _read_json(path)
    if stored is None:
        if mode == "evaluate":
            raise FileNotFoundError(f"nothing trained at {run}; run once without --mode=evaluate")
        evaluate.write_text(path, json.dumps(config.to_dict(), indent=1))
        return
    before = config_lib.flatten(ConfigDict(stored))
    own = methods.METHODS[name].fields
    others = {field for method in methods.METHODS.values() for field in method.fields} - {*own}
    ignored = (*FREE_FIELDS, *others)
    differing = [
        f"{field}: was {before.get(field)!r}, is {value!r}"
        for field, value in flat.items()
        if not field.startswith(ignored) and _plain(before.get(field)) != value
    ]
    if differing:
        raise ValueError(
            f"{run} was trained with another configuration ({'; '.join(differing)}); use another "
            "--workdir, or for another view of the same model --config.eval.resize"
        )


def results_table(results: dict) -> str:
    """The aggregate as a plain-text table: one row per method, category and domain."""
    names = ("image_auroc", "pixel_auroc", "aupro_0.3", "pro_mmr")
    rows = [["method", "data", "domain", *names]]
    for method, content in results["methods"].items():
        for key, domains in content["metrics"].items():
            for domain, values in domains.items():
                cells = []
                for name in names:
                    spread = values[name]["std"]
                    text = evaluate.percent(values[name]["mean"])
                    cells.append(text if spread is None else f"{text} ± {100 * spread:.1f}")
                rows.append([method, key, domain, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _read_json(path: pathlib.Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _use_compile_cache() -> None:
    """Compiled programs are kept between runs, unless the user has chosen a place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = pathlib.Path("~/.cache/mmrjax/xla").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    sys.exit(main())
