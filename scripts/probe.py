"""What a linear probe reads from the students of finished runs: the domain, and the defect.

    python scripts/probe.py runs/none/mmr_plus/tile/seed54 runs/supcon/mmr_plus/tile/seed54 \
        --config.data.raw_dir=<tiles>

Aligning domains (mmr_plus.domain) is to make the first harder and leave the second as it is (spec,
section 5). Both are read from the mean of the student's tokens of each test image, of which nothing
is masked, and, where the alignment has trained a head, from what it makes of them; beside it from
what heads of the same form make of them that nobody has trained.

A probe is a logistic regression, fitted to four fifths of the groups of test images and judged by
the others, five times, and all that for ten draws of the fifths. The domain is read from good
images, the defect within each domain: a domain with more defects than others tells nothing of them.
What has fewer than five groups is left out. Told is the share recognised, the mean over draws, then
over classes (and domains), with the interval of 95 % over groups of test images for probes as they
were fitted, and the difference to the first run with its own. The labels of the test describe here,
and choose nothing.

The records are those of the run; where they are absent they are built, as mmrjax.main does.
"""

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Sequence

import ablate
import jax
import numpy as np
from ml_collections import ConfigDict
from sklearn import linear_model, model_selection, preprocessing

from mmrjax import command_line, files, mesh, methods, report_tables, restore, train
from mmrjax import config as config_lib
from mmrjax import main as main_lib
from mmrjax.data import geometry, records, tracks
from mmrjax.methods import mmr, mmr_plus
from mmrjax.metrics import bootstrap
from mmrjax.models import resnet

FOLDS, DRAWS, RESAMPLES = 5, 10, 1000
RANDOM_HEADS = 5
PLACES = ("data.raw_dir", "data.data_dir", "raw_dirs.")
HEAD = "domain_head"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of some of the test images.

    Attributes:
      rows: bool [n], of which.
      classes: [n], the answers.
      cells: str [n], what is averaged over: a class, or a class in one domain.
    """

    rows: np.ndarray
    classes: np.ndarray
    cells: np.ndarray


def questions(label: np.ndarray, domain: np.ndarray, group: np.ndarray) -> dict[str, Question]:
    """The questions that can be asked of test images; label int, domain and group str, [n] each."""
    good, found = label == records.GOOD, {}
    asked = common(np.where(good, domain, ""), group) & good
    if len(np.unique(domain[asked])) > 1:
        found["domain"] = Question(asked, domain, domain)
    cells = np.char.add(np.where(good, "good ", "defect "), domain)
    asked = common(cells, group)
    both = set(domain[asked & good].tolist()) & set(domain[asked & ~good].tolist())
    if both:
        found["defect"] = Question(asked & np.isin(domain, list(both)), label, cells)
    return found


def common(cells: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Whether an image's cell has a group for every fold, bool [n]."""
    names = [one for one in np.unique(cells) if len(np.unique(group[cells == one])) >= FOLDS]
    return np.isin(cells, names)


def representations(
    trained: train.Trained, data: records.Records, indices: np.ndarray, batch: int
) -> dict[str, list[np.ndarray]]:
    """What is read of some records, float32 [n, c] each, of a source one or several.

    Returns:
      {"tokens": [their mean]}; with a head of the alignment also {"head": [...], "random heads":
      [...] of RANDOM_HEADS draws}.
    """
    method = trained.method
    has_head = isinstance(method, mmr_plus.MMRPlus) and HEAD in method.heads

    @jax.jit
    def read(variables, images):
        tokens = mmr_plus.pooled(method.whole(variables, resnet.normalise(images / 255.0)))
        if not has_head:
            return {"tokens": [tokens]}
        head, drawn = method.heads[HEAD], jax.random.split(jax.random.key(0), RANDOM_HEADS)
        fresh = [head.apply(head.init(key, tokens), tokens) for key in drawn]
        trained_head = method.project(HEAD, variables, tokens)
        return {"tokens": [tokens], "head": [trained_head], "random heads": fresh}

    found, view = [], geometry.View.of(method.config, evaluation=True)
    for images, _, real in geometry.batches(data, indices, view, batch):
        got = jax.device_get(read(trained.variables, mesh.put_batch(images, trained.mesh)))
        found.append((got, real))
    return {
        source: [np.concatenate([got[source][i][:real] for got, real in found])
                 for i in range(len(found[0][0][source]))]
        for source in found[0][0]
    }  # fmt: skip


def recognised(
    features: Sequence[np.ndarray], classes: np.ndarray, cells: np.ndarray, group: np.ndarray
) -> np.ndarray:
    """How often probes that have not seen an image's group tell its class, float64 [n] in [0, 1].

    Args:
      features: float32 [n, c] each, which take turns in the draws.
      classes: [n], to tell.
      cells: str [n], each of which weighs alike in the fit.
      group: str [n], never on both sides.
    """
    _, cell, count = np.unique(cells, return_inverse=True, return_counts=True)
    weight = len(cells) / (len(count) * count[cell])
    right = np.zeros(len(classes))
    for draw in range(DRAWS):
        x = features[draw % len(features)]
        folds = model_selection.StratifiedGroupKFold(FOLDS, shuffle=True, random_state=draw)
        for fit, judge in folds.split(x, cells, group):
            scale = preprocessing.StandardScaler().fit(x[fit])
            probe = linear_model.LogisticRegression(max_iter=5000)
            probe.fit(scale.transform(x[fit]), classes[fit], sample_weight=weight[fit])
            right[judge] += probe.predict(scale.transform(x[judge])) == classes[judge]
    return right / DRAWS


def accuracy(right: np.ndarray, cells: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The mean over cells of the mean of `right`, float64 [1 + RESAMPLES].

    Of all, then of resampled groups; NaN where a resample lacks a cell. The same groups are drawn
    for the same `group`.
    """
    _, index = np.unique(group, return_inverse=True)
    weight = bootstrap.multiplicities(index.max() + 1, RESAMPLES, 0)[:, index]
    with np.errstate(invalid="ignore"):
        shares = [
            (weight * right)[:, cells == one].sum(1) / weight[:, cells == one].sum(1)
            for one in np.unique(cells)
        ]
    return np.mean(shares, axis=0)


def probed(folder: pathlib.Path, places: Sequence[str]) -> tuple[dict, dict, list[str]]:
    """What is read from one run.

    Args:
      folder: of the run.
      places: fields of the configuration that say where the data lie now.

    Returns:
      ({(from, question): `accuracy`}, {question: share of a guess}, ids of the test images).

    Raises:
      ValueError: a run without student or of tiles, data that are not its own, or no question.
    """
    name = folder.parent.parent.name
    if not issubclass(methods.METHODS.get(name, object), mmr.MMR):
        raise ValueError(f"{folder}: {name} has no student; give an MMR or MMR+ run")
    if not re.fullmatch(r"seed\d+", folder.name):
        raise ValueError(f"{folder}: the folder of a run is called seed<k>, by which it was drawn")
    trained, config = restore.trained(folder)
    if config.data.tiling:
        raise ValueError(f"{folder} looks at images in tiles; a probe reads whole ones")
    config_lib.override(config, places)
    data = _data(folder, config)
    test = tracks.select(data, config.data, int(folder.name.removeprefix("seed"))).test
    parts = tracks.part_of(data)[test]
    domain = parts if len(np.unique(parts)) > 1 else data.table["domain"][test]
    group = data.table["group"][test]
    asked = questions(data.table["label"][test], domain, group)
    if not asked:
        raise ValueError(f"{folder}: its test images have no {FOLDS} groups of two classes")
    read, found = representations(trained, data, test, config.eval.batch_size), {}
    for name, question in asked.items():
        rows = question.rows
        classes, cells, own = question.classes[rows], question.cells[rows], group[rows]
        for source, features in read.items():
            right = recognised([x[rows] for x in features], classes, cells, own)
            found[source, name] = accuracy(right, cells, own)
    guess = {name: 1 / len(np.unique(q.classes[q.rows])) for name, q in asked.items()}
    return found, guess, data.table["id"][test].tolist()


def _data(folder: pathlib.Path, config: ConfigDict) -> records.Records:
    """The records that a run was trained on."""
    digest = (files.read_json(folder / "config.json") or {}).get("data_digest")
    for unit in main_lib.load_records(config):
        if unit.category == folder.parent.name and unit.digest == digest:
            return unit
    raise ValueError(
        f"{folder} was trained on other data; say where its own are, such as "
        "--config.data.raw_dir=… (of joined data sets --config.raw_dirs.<name>=… for each)"
    )


def table(runs: dict[str, dict], guess: dict[str, float]) -> str:
    """One row for each run, representation and question, in percent."""
    lines, first = [["run", "from", "read", "guess", "recognised", "to the first run"]], None
    for name, found in runs.items():
        first = first or found
        for (source, question), values in found.items():
            same = None if found is first else first.get((source, question))
            gap = "" if same is None else _text(values - same, "+.1f")
            chance = report_tables.percent(guess[question])
            lines.append([name, source, question, chance, _text(values, ".1f"), gap])
    return report_tables.aligned(lines)


def _text(values: np.ndarray, form: str) -> str:
    """The value and its interval, in percent."""
    ends = bootstrap.interval(values[1:])
    inside = "–" if ends is None else ", ".join(format(100 * end, form) for end in ends)
    return f"{100 * values[0]:{form}} [{inside}]"


def _run(arguments: argparse.Namespace, places: Sequence[str]) -> int:
    runs, images = {}, None
    for folder in dict.fromkeys(arguments.runs):
        runs[str(folder)], guess, own = probed(restore.find_run(folder).resolve(), places)
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
    return command_line.run(lambda: _run(arguments, fields))


if __name__ == "__main__":
    sys.exit(main())
