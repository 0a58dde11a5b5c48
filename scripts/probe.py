"""What a linear probe reads from the students of finished runs: the domain, and the defect.

    python scripts/probe.py runs/none/mmr_plus/tile/seed54 runs/supcon/mmr_plus/tile/seed54 \
        --config.data.raw_dir=<tiles>

Aligning domains (mmr_plus.domain) is to make the first harder and leave the second as it is (spec,
section 5). Both are read twice from each test image, of which nothing is masked: from the mean of
the student's tokens, and from what the alignment's own head makes of it. A run without that head is
given a fresh one, whose projection is random, so that both runs have it.

A probe is a logistic regression, fitted to four fifths of the groups of test images and judged by
the others, five times. The domain is read from good images alone, those of domains with five groups
or more. Told is the balanced accuracy, the mean over classes of the share recognised, with the
interval of 95 % over groups of test images, and the difference to the first run with its own. Test
labels describe here and choose nothing.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import ablate
import jax
import numpy as np
from sklearn import linear_model, model_selection, pipeline, preprocessing

from mmrjax import command_line, files, mesh, report_tables, restore, train
from mmrjax import main as main_lib
from mmrjax.data import geometry, records, tracks
from mmrjax.methods import mmr, mmr_plus
from mmrjax.metrics import bootstrap
from mmrjax.models import resnet

FOLDS, RESAMPLES = 5, 1000
PLACES = ("data.raw_dir=", "data.data_dir=", "raw_dirs.")
HEAD = "domain_head"


def representations(
    trained: train.Trained, data: records.Records, indices: np.ndarray, batch: int
) -> dict[str, np.ndarray]:
    """{"tokens": float32 [n, d], "head": float32 [n, 128]} of some records."""
    method, variables = trained.method, trained.variables
    head = method.heads.get(HEAD) if isinstance(method, mmr_plus.MMRPlus) else None
    head = head or mmr_plus.Head(method.dtype)
    width = np.zeros((1, method.student.width), np.float32)
    weights = variables["params"].get(HEAD) or head.init(jax.random.key(0), width)["params"]

    @jax.jit
    def read(variables, weights, images):
        tokens = mmr_plus.pooled(method.whole(variables, resnet.normalise(images / 255.0)))
        return {"tokens": tokens, "head": head.apply({"params": weights}, tokens)}

    found, view = [], geometry.View.of(method.config, evaluation=True)
    for images, _, real in geometry.batches(data, indices, view, batch):
        images = mesh.put_batch(images, trained.mesh)
        got = read(variables, weights, images)
        found.append({name: np.asarray(x)[:real] for name, x in got.items()})
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def recognised(features: np.ndarray, classes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Whether a probe that has not seen an image's group recognises its class, bool [n]."""
    probe = pipeline.make_pipeline(
        preprocessing.StandardScaler(),
        linear_model.LogisticRegression(class_weight="balanced", max_iter=5000),
    )
    folds = model_selection.StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    guessed = model_selection.cross_val_predict(probe, features, classes, groups=group, cv=folds)
    return guessed == classes


def common(classes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Whether an image's class has a group for every fold, bool [n]."""
    names = [one for one in np.unique(classes) if len(np.unique(group[classes == one])) >= FOLDS]
    return np.isin(classes, names)


def accuracy(right: np.ndarray, classes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Balanced accuracy, of all and of resampled groups, float64 [1 + RESAMPLES].

    NaN where a resample lacks a class. The same groups are drawn for the same `group`.
    """
    _, index = np.unique(group, return_inverse=True)
    weight = bootstrap.multiplicities(index.max() + 1, RESAMPLES, 0)[:, index]
    with np.errstate(invalid="ignore"):
        shares = [
            (weight * right)[:, classes == one].sum(1) / weight[:, classes == one].sum(1)
            for one in np.unique(classes)
        ]
    return np.mean(shares, axis=0)


def probed(folder: pathlib.Path, places: dict[str, str]) -> tuple[dict, dict, list[str]]:
    """What is read from one run.

    Args:
      folder: of the run.
      places: fields of the configuration that say where the data lie now.

    Returns:
      ({(from, question): `accuracy`}, {question: accuracy of a guess}, ids of the test images).
    """
    trained, config = restore.trained(folder)
    if not isinstance(trained.method, mmr.MMR):
        raise ValueError(f"{folder}: {trained.method.name} has no student; give an MMR or MMR+ run")
    config.update_from_flattened_dict(places)
    category = folder.resolve().parent.name
    data = next(unit for unit in main_lib.load_records(config) if unit.category == category)
    seed = int(folder.resolve().name.removeprefix("seed"))
    test = tracks.select(data, config.data, seed).test
    read = representations(trained, data, test, config.eval.batch_size)
    label, group = data.table["label"][test], data.table["group"][test]
    parts = tracks.part_of(data)[test]
    domain = parts if len(np.unique(parts)) > 1 else data.table["domain"][test]
    found, guess = {}, {}
    for question, classes, rows in (
        ("domain", domain, label == records.GOOD),
        ("defect", label, np.ones(len(test), bool)),
    ):
        rows[rows] = common(classes[rows], group[rows])
        names = np.unique(classes[rows])
        if len(names) < 2:
            raise ValueError(
                f"{folder}: a probe needs test images of two {question}s, {FOLDS} groups of each"
            )
        guess[question] = 1 / len(names)
        for source, features in read.items():
            right = recognised(features[rows], classes[rows], group[rows])
            found[source, question] = accuracy(right, classes[rows], group[rows])
    return found, guess, data.table["id"][test].tolist()


def table(runs: dict[str, dict], guess: dict[str, float]) -> str:
    """One row for each run, representation and question, in percent."""
    lines, first = [["run", "from", "read", "guess", "recognised", "to the first run"]], None
    for name, found in runs.items():
        first = first or found
        for (source, question), values in found.items():
            gap = "" if found is first else _text(values - first[source, question], "+.1f")
            chance = report_tables.percent(guess[question])
            lines.append([name, source, question, chance, _text(values, ".1f"), gap])
    return report_tables.aligned(lines)


def _text(values: np.ndarray, form: str) -> str:
    """The value and its interval, in percent."""
    ends = bootstrap.interval(values[1:])
    inside = "–" if ends is None else ", ".join(format(100 * end, form) for end in ends)
    return f"{100 * values[0]:{form}} [{inside}]"


def _run(arguments: argparse.Namespace, places: dict[str, str]) -> int:
    runs, images = {}, None
    for folder in arguments.runs:
        runs[str(folder)], guess, own = probed(restore.find_run(folder), places)
        if images not in (None, own):
            raise ValueError(f"{folder}: its test images are not those of {arguments.runs[0]}")
        images = own
    print(table(runs, guess))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 and one line on standard error when there is none."""
    parser = argparse.ArgumentParser(
        prog="scripts/probe.py",
        description="What a linear probe reads from students: the domain, and the defect.",
        epilog="--config.data.raw_dir=… and the like say where the data lie now.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=files.local_path, help="folders of finished runs")
    fields, rest = ablate.split_fields(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(rest)
    for field in fields:
        if not field.startswith(PLACES):
            parser.error(f"--config.{field}: only {', '.join(PLACES)} can differ from the run")
    places = dict(field.split("=", 1) for field in fields)
    return command_line.run(lambda: _run(arguments, places))


if __name__ == "__main__":
    sys.exit(main())
