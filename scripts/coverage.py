"""False alarms of promised thresholds over redrawn training pictures, on real good pictures.

python scripts/coverage.py --config=configs/magnetic_tile.py --parts=60,20,5 --draws=20 \
    --config.data.raw_dir=<folder>

Draws so many good parts, one picture of each, trains the first method of the configuration on them,
sets its threshold without any other picture, and counts the good pictures of all other parts above
the threshold, one picture a part. The promise is about the mean over draws. The last column is the
share of draws in which the simultaneous bound holds at every threshold, as far as the other parts
show it. No defective picture is read.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np

from mmrjax import methods
from mmrjax.data.records import GOOD, Records
from mmrjax.evaluate import calibrate, guarantees, scoring
from mmrjax.runs import records as records_lib
from mmrjax.runtime import command_line, devices, logs
from mmrjax.runtime import config as config_lib
from mmrjax.train import loop


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each number of parts."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--parts", default="60,20,5", help="training parts, several in turn")
    parser.add_argument("--draws", type=int, default=20)
    arguments = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    config = config_lib.load(arguments.config, overrides)
    logs.setup()
    command_line.keep_compiled()
    devices.show_cores({config.eval.batch_size})
    records = next(iter(records_lib.load_records(config)))
    good = records.take(np.flatnonzero(records.table["label"] == GOOD))
    print("| parts | promised | good rejected, mean of draws | least and most | bound holds |")
    print("|---|---|---|---|---|")
    for parts in map(int, arguments.parts.split(",")):
        found = [draw(config, good, parts, seed) for seed in range(arguments.draws)]
        promises, rates, holds = (np.array(column) for column in zip(*found, strict=True))
        cells = (guarantees.percent(x) for x in (promises.mean(), rates.mean(), *_ends(rates)))
        promised, mean, least, most = cells
        print(
            f"| {parts} | {promised} | {mean} | {least}, {most} | {holds.sum()} of {len(holds)} |"
        )


def draw(config, good: Records, parts: int, seed: int) -> tuple[float, float, bool]:
    """(promised rate, share of the other parts above the threshold, whether the bound holds)."""
    rng = np.random.default_rng((seed, parts))
    rows = rng.permutation(len(good))
    _, first = np.unique(good.table["group"][rows], return_index=True)
    rows = rng.permutation(rows[first])  # one picture of each part
    train, rest = good.take(np.sort(rows[:parts])), good.take(np.sort(rows[parts:]))
    method = methods.create(config.method.names[0], config)
    with tempfile.TemporaryDirectory() as folder:
        trained = loop.train(method, train, seed, pathlib.Path(folder))
    scorer = scoring.Scorer(trained, config)
    calibration = scorer.left_out(train)
    scores = scorer.calibration(rest).scores
    threshold = calibration.threshold(calibration.reachable(config.calibration.target_fpr))
    steps = guarantees.simultaneous(calibration.scores, calibration.groups)
    rates = np.mean(scores > np.array(steps["at"])[:, None], axis=1)
    promised = calibrate.promised_rate(calibration.scores, calibration.groups, threshold)
    return promised, np.mean(scores > threshold), bool((rates <= steps["bound"]).all())


def _ends(rates: np.ndarray) -> tuple[float, float]:
    return rates.min(), rates.max()


if __name__ == "__main__":
    main()
