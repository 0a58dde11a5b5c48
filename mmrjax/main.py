"""Trains, evaluates, reports: python -m mmrjax.main --config=configs/demo.py --workdir=runs/demo.

Every command can be repeated: what is finished is not done again, and a killed run continues where
its last checkpoint was. Runs lie in <workdir>/<method>/<category>/seed<k>/ (the method first, so
that several methods share one work directory and one report); another view of finished runs lies in
<workdir>/evaluations/<view>/. A configuration that declares a sweep has one such work directory per
row, <workdir>/<row>/, and its comparison on top (see sweep.py).

Several processes (`--distributed` on TPU pods, SLURM and Open MPI) run the same command together;
work directory, records and raw data lie on storage that all of them see. The first one writes.
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
from mmrjax import (
    aggregate,
    evaluate,
    files,
    logs,
    methods,
    processes,
    report,
    report_sweep,
    report_tables,
    sweep,
    train,
)
from mmrjax import config as config_lib
from mmrjax import mesh as mesh_lib
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
    "train.fsdp",
    "eval.",
    "report.",
    "ckpt.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return processes.run(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    started = time.monotonic()
    logs.setup()
    try:
        config, arguments = parse(argv)
        config_lib.validate(config)
        _use_compile_cache()
        if arguments.distributed:
            processes.initialize(
                arguments.coordinator, arguments.num_processes, arguments.process_id
            )
        if config.sweep.rows:
            table, report_path = run_sweep(config, arguments.workdir, arguments.mode)
        else:
            results, report_path = run_all(config, arguments.workdir, arguments.mode)
            table = results_table(results)
    except train.Interrupted as e:
        message, number = e.args
        _complain(f"{message}; the same command continues")
        return 128 + number
    except KeyboardInterrupt:
        _complain("interrupted; the same command continues")
        return 130
    except (ValueError, FloatingPointError, RuntimeError, OSError) as e:
        if os.environ.get("MMRJAX_TRACEBACK"):
            raise
        _complain(f"error: {files.explain(e)}")
        return 1
    if processes.is_first():
        print(table)
        print(f"\nreport: {report_path} ({time.monotonic() - started:.0f} s)")
    return 0


def _complain(line: str) -> None:
    print(f"{processes.own_name()}{line}", file=sys.stderr)


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
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--coordinator", help="host:port of the first process, where not detected")
    parser.add_argument("--num_processes", type=int, help="where not detected")
    parser.add_argument("--process_id", type=int, help="of this one, from 0; where not detected")
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
            f"unknown argument {unknown[0]!r}; known: --config, --workdir, --mode, --distributed, "
            "--coordinator, --num_processes, --process_id and --config.<group>.<field>=<value>"
        )
    given = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    arguments.distributed |= any(value is not None for value in given)
    return config_lib.load(arguments.config, overrides), arguments


def run_all(config: ConfigDict, workdir: pathlib.Path, mode: str) -> tuple[dict, pathlib.Path]:
    """Every method, category and seed in turn; then the aggregate and the report."""
    logging.info("jax %s on %s", jax.__version__, mesh_lib.devices())
    for name in config.method.names:
        if name not in methods.METHODS:
            known = sorted(methods.METHODS)
            raise ValueError(f"--config.method.names={name}: unknown; known: {known}")
    wanted = None
    if mode == "evaluate":
        wanted = processes.first(lambda: trained_runs(workdir))
    processes.first(lambda: check_workdir(config, workdir))
    directories = processes.first(lambda: build_records(config))
    root = results_root(config, workdir)
    parts = map(records_lib.load, directories.values())
    for records in splits.units(parts, config.data.protocol):
        category = records.category
        runs = [
            (name, category, seed) for name in config.method.names for seed in config.train.seeds
        ]
        if wanted is not None:
            runs = [run for run in wanted if run[1] == category]
        for name, _, seed in runs:
            path = pathlib.Path(name, category, f"seed{seed}")
            run_one(config, name, records, seed, workdir / path, root / path, mode)
    results = processes.first(
        lambda: aggregate.aggregate(root, config.title, config.data.reference_domain)
    )
    return results, pathlib.Path(processes.first(lambda: str(report.write_report(root))))


def build_records(config: ConfigDict) -> dict[str, str]:
    """Builds what is missing or stale: {category: directory of its records}."""
    try:
        directories = build.build(
            config.data.name,
            config.data.raw_dir or None,
            config.data.data_dir,
            list(config.data.categories) or None,
        )
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e} (here: --config.data.raw_dir=…)") from e
    return {category: str(directory) for category, directory in directories.items()}


def run_sweep(config: ConfigDict, workdir: pathlib.Path, mode: str) -> tuple[str, pathlib.Path]:
    """Every row of `config.sweep` as an ordinary run; (table, path of the comparison)."""
    content, path = sweep.run(config, workdir, lambda own, folder: run_all(own, folder, mode))
    return report_sweep.text_table(content), path


def trained_runs(workdir: pathlib.Path) -> list[tuple[str, str, int]]:
    """(method, category, seed) of every run in a work directory.

    Raises:
      FileNotFoundError: there is none.
    """
    found = [path.parent for path in sorted(workdir.glob("*/*/seed*/config.json"))]
    runs = [(p.parent.parent.name, p.parent.name, int(p.name[4:])) for p in found]
    runs = [run for run in runs if run[0] in methods.METHODS]
    if not runs:
        raise FileNotFoundError(f"nothing trained in {workdir}; run once without --mode=evaluate")
    return runs


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
    config, finished = _settle(config, name, records, run, folder, mode)
    if finished:
        logging.info("%s: finished before, see %s", run, folder / "results.json")
        return
    train_rows, test_rows = splits.select(records, config.data.protocol, config.data.shots, seed)
    trained = train.train(
        config, name, records, train_rows, seed, run, evaluate_only=mode == "evaluate"
    )
    if folder != run:  # another view: the report there shows the same training
        processes.first(lambda: _copy_training(run, folder))
    evaluate.evaluate(trained, records, test_rows, config, seed, folder)


def _settle(config, name, records, run, folder, mode) -> tuple[ConfigDict, bool]:
    """The configuration to go on with, and whether its results are there."""

    def settle() -> tuple[dict, bool]:
        settled = settle_config(config, name, run, records.digest, mode)
        results = files.read_json(folder / "results.json")
        finished = results and results["facts"].get("eval") == evaluate.eval_fields(settled)
        return settled.to_dict(), bool(finished)

    content, finished = processes.first(settle)
    return ConfigDict(content), finished


def _copy_training(run: pathlib.Path, folder: pathlib.Path) -> None:
    for file in ("config.json", "metrics.jsonl"):
        if (run / file).exists():
            files.write_text(folder / file, (run / file).read_text())


def results_root(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """The work directory, or a folder in it for a view or a mode other than the trained one."""
    parts = []
    if config.eval.resize and tuple(config.eval.resize) != tuple(config.data.resize):
        parts.append("resize{}x{}".format(*config.eval.resize))
    if config.eval.metrics_mode != "standard":
        parts.append(f"metrics_{config.eval.metrics_mode}")
    return workdir / "evaluations" / "-".join(parts) if parts else workdir


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises ValueError when the work directory holds a sweep, or runs on another data set."""
    if "rows" in (files.read_json(workdir / "results.json") or {}):
        raise ValueError(f"{workdir} holds a sweep, with runs of its own; use another --workdir")
    for path in workdir.glob("*/*/seed*/config.json"):
        stored = (files.read_json(path) or {}).get("data", {}).get("name", config.data.name)
        if stored != config.data.name:
            raise ValueError(
                f"{workdir} holds runs on {stored}, this configuration is for {config.data.name}; "
                "use another --workdir"
            )


def settle_config(
    config: ConfigDict, name: str, run: pathlib.Path, digest: str, mode: str
) -> ConfigDict:
    """Holds the configuration against the run's config.json, or writes that.

    Args:
      config: of this call.
      name: of the method.
      run: directory of the run.
      digest: of the records; a run belongs to the data it was trained on.
      mode: with "evaluate", what is stored wins over `config` in every field that shaped training.

    Returns:
      The configuration to go on with.

    Raises:
      ValueError: fields that change what is trained differ, naming them.
    """
    path = run / "config.json"
    stored = files.read_json(path)
    begun = any(p.name.isdigit() for sub in ("checkpoints", "fitted") for p in run.glob(f"{sub}/*"))
    if stored is None or not (begun or mode == "evaluate"):
        # A run without any saved step may still change its mind.
        content = {**config.to_dict(), "data_digest": digest}
        files.write_text(path, json.dumps(content, indent=1))
        return config
    if stored.pop("data_digest", digest) != digest:
        raise ValueError(
            f"{run} was trained on other data than the records hold now; use another --workdir"
        )
    own = methods.METHODS[name].fields
    others = {field for method in methods.METHODS.values() for field in method.fields} - {*own}
    others |= {*methods.METHODS[name].own}
    before, settled = config_lib.flatten(ConfigDict(stored)), config.copy_and_resolve_references()
    differing = {}
    for field, value in config_lib.flatten(config).items():
        old = before.get(field, value)
        old = tuple(old) if isinstance(value, tuple) else old
        if old != value and not field.startswith((*FREE_FIELDS, *others)):
            differing[field] = old
    if differing and mode == "evaluate":
        settled.update_from_flattened_dict(differing)
    elif differing:
        flat = config_lib.flatten(config)
        listed = "; ".join(f"{f}: was {old!r}, is {flat[f]!r}" for f, old in differing.items())
        raise ValueError(
            f"{run} was trained with another configuration ({listed}); use another --workdir, or "
            "for another view of the same model --mode=evaluate --config.eval.resize=…"
        )
    return settled


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
        if sum(len(domains) for domains in content["metrics"].values()) > 1:
            means = [content["summary"].get(name, {}).get("mean") for name in names]
            rows.append(
                [method, "mean", "over domains, then categories", *map(evaluate.percent, means)]
            )
    return report_tables.aligned(rows)


def _use_compile_cache() -> None:
    """Compiled programs are kept between runs, unless the user has chosen a place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = pathlib.Path("~/.cache/mmrjax/xla").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    sys.exit(main())
