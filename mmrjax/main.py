"""Trains, evaluates, reports: python -m mmrjax.main --config=configs/demo.py --workdir=runs/demo.

Every command can be repeated: finished work is not done again, and a killed run continues from its
last checkpoint. Runs lie in <workdir>/<method>/<category>/seed<k>/. The method comes first, so that
several methods share one work directory and one report. Another view of finished runs lies in
<workdir>/evaluations/<view>/ (see runs/workdir.py). A configuration that declares a sweep has such
a work directory for each row, <workdir>/<row>/, and its comparison on top (see runs/sweep.py).

Several processes (`--distributed` on TPU pods, SLURM and Open MPI) run the same command together.
Work directory, records and raw data lie on storage that all processes see. Only the first writes.

The work directory and `data.data_dir` may be in a bucket, gs://… (see runs/staging.py and
data_builders/remote.py).
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
from absl import logging
from ml_collections import ConfigDict

from data_builders import build
from mmrjax import methods
from mmrjax.data import tracks
from mmrjax.report import page, tables
from mmrjax.report import sweep as report_sweep
from mmrjax.runs import aggregate, places, staging, sweep
from mmrjax.runs import arguments as arguments_lib
from mmrjax.runs import records as records_lib
from mmrjax.runs import run as run_lib
from mmrjax.runs import workdir as workdir_lib
from mmrjax.runtime import command_line, devices, files, logs, processes, trackers
from mmrjax.runtime import config as config_lib


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return processes.run(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    started = time.monotonic()
    logs.setup()
    devices.keep_freed()
    try:
        config, arguments = parse(argv)
        records_lib.choose(config, arguments.fields)
        config_lib.validate(config, methods.METHODS)
        trackers.check(config.log.trackers)
        command_line.keep_compiled()
        if arguments.distributed:
            processes.initialize(
                arguments.coordinator, arguments.num_processes, arguments.process_id
            )
        else:
            devices.show_cores(batch_sizes(config))
        with staging.opened(arguments.workdir) as stage:
            if config.sweep.rows:
                table, report_path = run_sweep(config, stage, arguments.mode)
            else:
                results, report_path = run_all(config, stage, stage.folder, arguments.mode)
                table = results_table(results)
    except processes.Interrupted as e:
        message, number = e.args
        _complain(f"{message}; the same command continues")
        return 128 + number
    except records_lib.Missing as e:
        for line in e.lines:
            _complain(line)
        return 1
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
        print(f"\nreport: {stage.named(str(report_path))} ({time.monotonic() - started:.0f} s)")
        if line := predict_command(arguments.workdir):
            print(line)
    return 0


def batch_sizes(config: ConfigDict) -> set[int]:
    """Batch sizes of training with each method of `config`, of evaluation, of rows of a sweep."""
    sizes = set()
    for own in [row.config for row in sweep.plan(config)] or [config]:
        sizes.add(own.eval.batch_size)
        for name in own.method.names:
            sizes |= methods.METHODS[name].batch_sizes(own)
    return sizes


def _complain(line: str) -> None:
    print(f"{processes.own_name()}{line}", file=sys.stderr)


def parse(argv: Sequence[str]) -> tuple[ConfigDict, argparse.Namespace]:
    """Parses the command line.

    Raises:
      ValueError: an unknown flag, a stray argument or a bad override, with what to type instead.
      FileNotFoundError: no such configuration.
    """
    parser = arguments_lib.train("python -m mmrjax.main", exit_on_error=False)
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    rest = [a for a in argv if not a.startswith("--config.")]
    is_given = any(a == "--config" or a.startswith("--config=") for a in rest)
    if not is_given and not {"-h", "--help"} & set(rest):
        raise ValueError(f"--config is missing; try {parser.prog} --config=configs/demo.py")
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
    arguments.fields = {text.partition("=")[0] for text in overrides}
    arguments.distributed |= any(value is not None for value in given)
    config = config_lib.load(arguments.config, overrides)
    if arguments.workdir is None:
        name, _, variant = arguments.config.partition(":")
        arguments.workdir = "_".join(filter(None, ("runs/" + pathlib.Path(name).stem, variant)))
    return config, arguments


def run_all(
    config: ConfigDict, stage: staging.Stage, workdir: pathlib.Path, mode: str
) -> tuple[dict, pathlib.Path]:
    """Every method, category and seed in turn; then the aggregate and the report.

    Args:
      config: the configuration of this call.
      stage: the stage of the whole command.
      workdir: its folder, or that of a row of a sweep.
      mode: "train" or "evaluate".

    Returns:
      (content of results.json, path of the report).
    """
    logging.info("jax %s on %s", jax.__version__, devices.available())
    for part, _, _ in tracks.combinations(config.data.held_out):
        build.load_builder(part.split("/")[0])  # a misspelled one would hold nothing out
    processes.first(lambda: workdir_lib.check(config, workdir))
    wanted = None
    if mode == "evaluate":
        wanted = processes.first(lambda: workdir_lib.trained_runs(workdir))
    root = workdir_lib.results_root(config, workdir)
    processes.first(
        lambda: records_lib.check_needs([config], weights=not workdir_lib.has_results(config, root))
    )
    for records in records_lib.load_records(config):
        category = records.category
        runs = [
            (name, category, seed) for name in config.method.names for seed in config.train.seeds
        ]
        if wanted is not None:
            runs = [run for run in wanted if run[1] == category]
        for name, _, seed in runs:
            path = workdir_lib.run_path(name, category, seed)
            store = stage.store(workdir / path)
            run = run_lib.Run(config, name, records, seed, workdir / path, root / path, store)
            run.perform(mode)
    results = processes.first(
        lambda: aggregate.aggregate(root, config.title, config.data.reference_domain)
    )
    path = processes.first(lambda: str(page.write_report(root, methods.METHODS)))
    return results, pathlib.Path(path)


def run_sweep(config: ConfigDict, stage: staging.Stage, mode: str) -> tuple[str, pathlib.Path]:
    """Every row of `config.sweep` as an ordinary run; (table, path of the comparison)."""
    content, path = sweep.run(
        config, stage.folder, lambda own, folder: run_all(own, stage, folder, mode)
    )
    return report_sweep.text_table(content, methods.METHODS), path


def predict_command(workdir: str) -> str:
    """The command that scores pictures with a run of a work directory; "" if there is no run."""
    if files.is_remote(workdir):
        return f"predict: mmrjax predict <images> --workdir={workdir}/<method>/<category>/seed<k>"
    found = places.runs(pathlib.Path(workdir))
    if not found:
        return ""
    others = f" (or another of {len(found)} runs)" if len(found) > 1 else ""
    return f"predict: mmrjax predict <images> --workdir={found[-1]}{others}"


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
                    text = tables.percent(values[name]["mean"])
                    cells.append(text if spread is None else f"{text} ± {100 * spread:.1f}")
                rows.append([method, key, domain, *cells])
        if sum(len(domains) for domains in content["metrics"].values()) > 1:
            means = [content["summary"].get(name, {}).get("mean") for name in names]
            rows.append(
                [method, "mean", "over domains, then categories", *map(tables.percent, means)]
            )
    return tables.aligned(rows)


if __name__ == "__main__":
    sys.exit(main())
