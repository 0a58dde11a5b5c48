"""Trains, evaluates, reports: python -m mmrjax.main --config=configs/demo.py --workdir=runs/demo.

Every command can be repeated: what is finished is not done again, and a killed run continues where
its last checkpoint was. Runs lie in <workdir>/<method>/<category>/seed<k>/ (the method first, so
that several methods share one work directory and one report); another view of finished runs lies in
<workdir>/evaluations/<view>/ (see workdir.py). A configuration that declares a sweep has one such
work directory per row, <workdir>/<row>/, and its comparison on top (see sweep.py).

Several processes (`--distributed` on TPU pods, SLURM and Open MPI) run the same command together;
work directory, records and raw data lie on storage that all of them see. The first one writes.

The work directory and `data.data_dir` may be in a bucket, gs://… (see staging.py and
data_builders/remote.py).
"""

import argparse
import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence

import jax
from absl import logging
from ml_collections import ConfigDict

from data_builders import buckets, build
from mmrjax import methods
from mmrjax.data import records as records_lib
from mmrjax.data import splits, tracks
from mmrjax.evaluate import results as evaluate
from mmrjax.report import page, tables
from mmrjax.report import sweep as report_sweep
from mmrjax.runs import aggregate, sweep
from mmrjax.runs import workdir as workdir_lib
from mmrjax.runtime import command_line, devices, files, logs, processes, staging, trackers
from mmrjax.runtime import config as config_lib
from mmrjax.train import loop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return processes.run(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    started = time.monotonic()
    logs.setup()
    devices.keep_freed()
    try:
        config, arguments = parse(argv)
        config_lib.validate(config)
        trackers.check(config.log.trackers)
        command_line.keep_compiled()
        if arguments.distributed:
            processes.initialize(
                arguments.coordinator, arguments.num_processes, arguments.process_id
            )
        else:
            devices.show_cores(batch_sizes(config))
        with staging.opened(arguments.workdir) as workdir:
            if config.sweep.rows:
                table, report_path = run_sweep(config, workdir, arguments.mode)
            else:
                results, report_path = run_all(config, workdir, arguments.mode)
                table = results_table(results)
    except processes.Interrupted as e:
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
        print(f"\nreport: {staging.named(str(report_path))} ({time.monotonic() - started:.0f} s)")
    return 0


def batch_sizes(config: ConfigDict) -> set[int]:
    """Of all that `config` runs: training with each of its methods, evaluation, rows of a sweep."""
    sizes = set()
    for one in [row.config for row in sweep.plan(config)] or [config]:
        run = [method for name, method in methods.METHODS.items() if name in one.method.names]
        field = "train.batch_size"
        fields = {method.own.get(field, field) for method in run if method.trains}
        sizes |= {config_lib.flatten(one)[field] for field in (*fields, "eval.batch_size")}
    return sizes


def _complain(line: str) -> None:
    print(staging.named(f"{processes.own_name()}{line}"), file=sys.stderr)


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
    parser.add_argument(
        "--workdir", required=True, type=staging.place, help="holds all of a run; may be gs://…"
    )
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
    logging.info("jax %s on %s", jax.__version__, devices.available())
    for name in config.method.names:
        if name not in methods.METHODS:
            known = sorted(methods.METHODS)
            raise ValueError(f"--config.method.names={name}: unknown; known: {known}")
    for part, _, _ in tracks.combinations(config.data.held_out):
        build.load_builder(part.split("/")[0])  # a misspelled one would hold nothing out
    wanted = None
    if mode == "evaluate":
        wanted = processes.first(lambda: workdir_lib.trained_runs(workdir))
    processes.first(lambda: workdir_lib.check(config, workdir))
    units = load_records(config)
    root = workdir_lib.results_root(config, workdir)
    for records in units:
        category = records.category
        runs = [
            (name, category, seed) for name in config.method.names for seed in config.train.seeds
        ]
        if wanted is not None:
            runs = [run for run in wanted if run[1] == category]
        for name, _, seed in runs:
            path = workdir_lib.run_path(name, category, seed)
            run, folder = workdir / path, root / path
            with contextlib.ExitStack() as stack:
                written = {folder} if mode == "evaluate" else {run, folder}
                processes.first(lambda w=written: _hold(stack, w))
                run_one(config, name, records, seed, run, folder, mode)
    results = processes.first(
        lambda: aggregate.aggregate(root, config.title, config.data.reference_domain)
    )
    return results, pathlib.Path(processes.first(lambda: str(page.write_report(root))))


def load_records(config: ConfigDict) -> Iterable[records_lib.Records]:
    """The records of each category, or of all together; builds what is missing or stale."""
    directories = processes.first(lambda: build_records(config))
    if buckets.is_remote(config.data.data_dir) and not processes.is_first():
        directories = build.fetch(config.data.name, config.data.data_dir, [*directories])
    parts = map(records_lib.load, directories.values())
    if config.data.join:
        return [tracks.joined(list(parts), config.data.held_out)]
    return splits.units(parts, config.data.protocol)


def build_records(config: ConfigDict) -> dict[str, str]:
    """Builds what is missing or stale: {category or, of joined ones, part: its records' folder}."""
    data = config.data
    if data.join:
        return _build_joined(config)
    try:
        directories = build.build(
            data.name, data.raw_dir or None, data.data_dir, list(data.categories) or None
        )
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e} (here: --config.data.raw_dir=…)") from e
    return {category: str(directory) for category, directory in directories.items()}


def _build_joined(config: ConfigDict) -> dict[str, str]:
    """The records of data.join: {"<dataset>/<category>": folder}; what is not given is left out.

    Raises:
      FileNotFoundError: a folder that is given holds no data set, or none is given.
      ValueError: data.join names what is none, or a category twice.
    """
    found, left_out = {}, []
    for entry in config.data.join:
        name, _, category = entry.partition("/")
        procedural = build.load_builder(name).PROCEDURAL
        raw_dir = config.raw_dirs.get(name, "")
        if not raw_dir and not procedural:
            left_out.append(name)
            continue
        try:
            directories = build.build(
                name, raw_dir or None, config.data.data_dir, [category] if category else None
            )
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{e} (here: --config.raw_dirs.{name}=…)") from e
        for category, directory in directories.items():
            part = f"{name}/{category}"
            if part in found:
                raise ValueError(f"--config.data.join={config.data.join}: {part} comes twice")
            found[part] = str(directory)
    hint = ", ".join(f"--config.raw_dirs.{name}=…" for name in dict.fromkeys(left_out))
    if not found:
        raise FileNotFoundError(f"none of the data sets of data.join is at hand; give {hint}")
    if left_out:
        logging.warning("left out for want of a folder: %s (%s)", ", ".join(left_out), hint)
    logging.info("data sets: %s", ", ".join(found))
    return found


def run_sweep(config: ConfigDict, workdir: pathlib.Path, mode: str) -> tuple[str, pathlib.Path]:
    """Every row of `config.sweep` as an ordinary run; (table, path of the comparison)."""
    content, path = sweep.run(config, workdir, lambda own, folder: run_all(own, folder, mode))
    return report_sweep.text_table(content), path


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
    track = tracks.select(records, config.data, seed)
    is_good = records.table["label"][track.train] == records_lib.GOOD
    train_rows, held_out = splits.hold_out(
        records, track.train[is_good], config.calibration.fraction, seed
    )
    labelled = splits.apart(records, track.train[~is_good], held_out)
    note = splits.few(records, train_rows)
    if note:
        logging.warning("%s/%s: %s", records.dataset, records.category, note)
    trained = loop.train(config, name, records, train_rows, seed, run, mode == "evaluate", labelled)
    trained.facts["notes"] = [note] if note else []
    if folder != run:  # another view: the report there shows the same training
        processes.first(lambda: _copy_training(run, folder))
    results = evaluate.evaluate(
        trained, records, track.test, config, seed, folder, held_out, track.unseen
    )
    if folder == run:
        processes.first(lambda: trackers.tell_results(config, run, results))
    staging.send(folder)


def _hold(stack: contextlib.ExitStack, folders: Iterable[pathlib.Path]) -> None:
    for folder in sorted(folders):  # two calls that wait for each other would wait for ever
        stack.enter_context(files.held(folder))


def _settle(config, name, records, run, folder, mode) -> tuple[ConfigDict, bool]:
    """The configuration to go on with, and whether its results are there."""

    def settle() -> tuple[dict, bool]:
        settled = workdir_lib.settle(config, name, run, records.digest, mode)
        return settled.to_dict(), workdir_lib.is_finished(folder, settled)

    content, finished = processes.first(settle)
    return ConfigDict(content), finished


def _copy_training(run: pathlib.Path, folder: pathlib.Path) -> None:
    for file in ("config.json", "metrics.jsonl"):
        if (run / file).exists():
            files.write_text(folder / file, (run / file).read_text())


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
    return tables.aligned(rows)


if __name__ == "__main__":
    sys.exit(main())
