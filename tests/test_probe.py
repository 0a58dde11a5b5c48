"""scripts/probe.py: what a linear probe reads, judged by groups it has not seen; on real runs."""

import csv
import importlib
import itertools
import pathlib
import shutil
import sys

import cv2
import numpy as np
import pytest

from mmrjax import main, restore
from mmrjax.methods import mmr_plus
from mmrjax.models import resnet

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"
GROUPS, SIDE = 10, 64


@pytest.fixture(scope="module")
def probe():
    """The script as a module; scripts/ is on the path only for this file."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("probe")
    sys.path.remove(str(SCRIPTS))


# --- the probe


def test_a_class_that_is_in_the_features_is_recognised(probe):
    rng = np.random.default_rng(0)
    classes, group = np.tile(["a", "b", "c"], 40), np.arange(120) // 3
    features = rng.normal(0, 1, (120, 5))
    features[:, 2] += 10 * (classes == "b")
    features[:, 3] += 10 * (classes == "c")
    assert probe.recognised([features], classes, classes, group).all()


def test_what_is_known_of_a_group_does_not_help(probe):
    """Every group has one class, and the features tell the group alone."""
    group = np.repeat(np.arange(20), 6)
    classes = np.where(np.random.default_rng(1).permutation(20) < 10, "a", "b")[group]
    features = np.eye(20)[group]
    assert probe.recognised([features], classes, classes, group).mean() <= 0.6


def test_a_domain_with_more_defects_tells_nothing_of_them(probe):
    """What is known of the domain alone recognises one of its two classes, whatever their share."""
    rng = np.random.default_rng(2)
    domain = np.repeat(["a", "b"], 200)
    label = np.where(rng.random(400) < np.where(domain == "a", 0.8, 0.2), 1, 0)
    group = np.arange(400) // 2
    features = np.stack([domain == "a", rng.normal(0, 1, 400)], axis=1).astype(float)
    asked = probe.questions(label, domain, group.astype(str))["defect"]
    right = probe.recognised([features], asked.classes, asked.cells, group)
    values = probe.accuracy(right, asked.cells, group)
    assert values[0] == pytest.approx(0.5, abs=0.06)
    features[:, 1] += 8 * label
    right = probe.recognised([features], asked.classes, asked.cells, group)
    assert probe.accuracy(right, asked.cells, group)[0] > 0.99


def test_draws_take_turns_with_what_is_read_and_are_averaged(probe):
    """Of two representations one tells all, the other nothing; no draw of folds counts alone."""
    rng = np.random.default_rng(3)
    classes, group = np.tile(["a", "b"], 60), np.arange(120) // 2
    told, untold = (classes == "b")[:, None] * 9.0, rng.normal(0, 1, (120, 1))
    right = probe.recognised([told, untold], classes, classes, group)
    assert right.min() >= 0.5
    assert right.mean() == pytest.approx(0.75, abs=0.08)
    alone = probe.recognised([untold], classes, classes, group)
    assert len(set(alone.tolist())) > 3


def test_accuracy_is_the_mean_over_classes_and_resamples_whole_groups(probe):
    classes = np.array(["a"] * 6 + ["b"] * 3)
    right = np.array([1, 1, 1, 0, 0, 0, 1, 1, 0], bool)
    group = np.array(list("xxyyzzxyz"))
    values = probe.accuracy(right, classes, group)
    assert values.shape == (1 + probe.RESAMPLES,)
    assert values[0] == pytest.approx((3 / 6 + 2 / 3) / 2)
    share = {"x": (2, 1), "y": (1, 1), "z": (0, 0)}  # right ones of a (of 2) and of b (of 1)
    possible = {
        round(np.mean([np.mean([share[g][0] / 2 for g in draw]),
                       np.mean([share[g][1] for g in draw])]), 6)
        for draw in np.stack(np.meshgrid(*[list("xyz")] * 3), -1).reshape(-1, 3)
    }  # fmt: skip
    assert {round(v, 6) for v in values.tolist()} == possible
    np.testing.assert_array_equal(values, probe.accuracy(right, classes, group))


def test_only_what_has_a_group_for_every_fold_is_asked(probe):
    """Lamp c has four groups of good images, lamp b none of defective ones."""
    domain = np.array(list("a" * 10 + "b" * 5 + "c" * 9))
    label = np.array([0] * 5 + [1] * 5 + [0] * 5 + [0] * 4 + [1] * 5)
    group = np.array([str(i) for i in range(24)])
    asked = probe.questions(label, domain, group)
    assert set(domain[asked["domain"].rows]) == {"a", "b"}
    assert label[asked["domain"].rows].sum() == 0
    assert set(domain[asked["defect"].rows]) == {"a"}
    assert asked["defect"].rows.sum() == 10
    assert set(probe.questions(label[:10], domain[:10], group[:10])) == {"defect"}
    assert set(probe.questions(label[:15] * 0, domain[:15], group[:15])) == {"domain"}
    assert probe.questions(label[:4], domain[:4], group[:4]) == {}


# --- real runs


def picture(rng, group, lamp, spot):
    """A surface: bright where the lamp is on, with a black square where there is a defect."""
    image = np.clip(80 + 100 * lamp + rng.normal(0, 12, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    if spot:
        image[16:48, 16:48] = 0
    return image


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_fields):
    """Of a run on surfaces under two lamps: good ones to train on, both kinds to test."""
    home, rng = tmp_path_factory.mktemp("probe"), np.random.default_rng(0)
    root, rows = home / "raw" / "lamps", [("image", "group", "domain")]
    for group in range(2 * GROUPS):
        for lamp in range(2):
            for spot in range(1 if group < GROUPS else 2):
                split = "train" if group < GROUPS else "test"
                name = f"{split}/{('good', 'spot')[spot]}/{group}_{lamp}.png"
                odd = (group, lamp, spot) == (GROUPS, 0, 0)  # a domain of one group: not probed
                rows.append((name, group, "torch" if odd else f"lamp{lamp}"))
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(root / name), picture(rng, group, lamp, spot))
    with (root / "groups.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    fields = [*tiny_fields(root, home / "records"), "--config.train.epochs=1"]
    off = ("hybrid=false", "tiny_weight=1", "contrast=none")
    return ["--config=configs/folder.py", *fields, *(f"--config.mmr_plus.{x}" for x in off)], home


@pytest.fixture(scope="module")
def runs(arguments):
    """(run without alignment, run with it)."""
    fields, home = arguments
    for domain in ("none", "supcon"):
        more = (f"--workdir={home / domain}", "--config.method.names=mmr_plus")
        assert main.main([*fields, *more, f"--config.mmr_plus.domain={domain}"]) == 0
    return tuple(restore.find_run(home / domain) for domain in ("none", "supcon"))


def test_domain_and_defect_are_read_from_two_runs(probe, runs, arguments, capsys, monkeypatch):
    monkeypatch.setattr(probe, "DRAWS", 2)
    place = next(a for a in arguments[0] if a.startswith("--config.data.data_dir="))
    before = {path: path.stat().st_mtime_ns for path in runs[0].parent.rglob("*")}
    given = [str(runs[0]), str(runs[1].parents[2])]  # a run, and a work directory with one
    assert probe.main([*given, place]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "run"
    cells = [line.split() for line in lines[1:]]
    assert [c[:3] for c in cells] == [
        [given[0], "tokens", "domain"],
        [given[0], "tokens", "defect"],
        [given[1], "head", "domain"],
        [given[1], "random", "heads"],
        [given[1], "tokens", "domain"],
        [given[1], "head", "defect"],
        [given[1], "random", "heads"],
        [given[1], "tokens", "defect"],
    ]
    assert {c[4 if c[1] == "random" else 3] for c in cells} == {"50.0"}
    read = {(c[0] == str(runs[0]), c[1], c[2]): float(c[4]) for c in cells}
    assert read[True, "tokens", "domain"] == 100  # of a lamp nothing has been taken away
    assert read[True, "tokens", "defect"] == 100
    assert [len(c) for c in cells] == [7, 7, 7, 8, 10, 7, 8, 10]  # the difference and its interval
    assert {path: path.stat().st_mtime_ns for path in runs[0].parent.rglob("*")} == before


def test_the_head_that_was_trained_is_read(probe, runs):
    """And heads that nobody has trained, on the same tokens."""
    trained, config = restore.trained(runs[1])
    data = next(iter(main.load_records(config)))
    rows = np.flatnonzero(data.table["split"] == "test")[:11]  # a batch, and a part of one
    read = probe.representations(trained, data, rows, 8)
    images = np.stack([data.image(i) for i in rows]).astype(np.float32) / 255
    features = trained.method.student.apply(trained.variables, resnet.normalise(images))
    tokens = np.asarray(features["latent"])[:, 1:].mean(axis=1)
    np.testing.assert_allclose(read["tokens"][0], tokens, atol=1e-5)
    head = mmr_plus.Head(np.float32)
    weights = trained.variables["params"]["domain_head"]
    np.testing.assert_allclose(read["head"][0], head.apply({"params": weights}, tokens), atol=1e-5)
    assert [x.shape for x in read["random heads"]] == [(11, 128)] * probe.RANDOM_HEADS
    several = [*read["head"], *read["random heads"]]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(several, 2)) > 0.01
    plain, _ = restore.trained(runs[0])
    assert set(probe.representations(plain, data, rows, 8)) == {"tokens"}


def test_what_cannot_be_probed_is_refused_in_a_line(probe, runs, capsys, tmp_path):
    bank = tmp_path / "bank/patchcore/lamps/seed1"
    bank.mkdir(parents=True)
    shutil.copy(runs[0] / "config.json", bank)
    assert probe.main([str(bank)]) == 1
    assert "patchcore has no student; give an MMR or MMR+ run" in capsys.readouterr().err
    shutil.copytree(runs[0], tmp_path / "mmr_plus" / "lamps" / "best")
    assert probe.main([str(tmp_path / "mmr_plus/lamps/best")]) == 1
    assert "the folder of a run is called seed<k>" in capsys.readouterr().err
    assert probe.main([str(tmp_path / "none")]) == 1
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        probe.main([str(runs[0]), "--config.student.depth=3"])
    assert stopped.value.code == 2
    assert "--config.student.depth=3: only data.raw_dir, data.da" in capsys.readouterr().err
    assert probe.main([str(runs[0]), "--config.raw_dirs.bogus=x"]) == 1
    assert "raw_dirs.bogus" in capsys.readouterr().err


def test_data_that_are_not_the_runs_own_are_refused(probe, runs, arguments, capsys, tmp_path):
    root = next(a for a in arguments[0] if a.startswith("--config.data.raw_dir=")).split("=", 1)[1]
    other = tmp_path / "lamps"
    shutil.copytree(root, other)
    one, two, *_ = (other / "test/good").iterdir()
    one.write_bytes(two.read_bytes())
    given = [f"--config.data.raw_dir={other}", f"--config.data.data_dir={tmp_path / 'records'}"]
    assert probe.main([str(runs[0]), *given]) == 1
    assert "was trained on other data; say where its own are" in capsys.readouterr().err


def test_few_groups_and_other_images_are_refused(probe, runs, arguments, capsys, monkeypatch):
    place = next(a for a in arguments[0] if a.startswith("--config.data.data_dir="))
    with monkeypatch.context() as patch:
        patch.setattr(probe, "FOLDS", 11)
        assert probe.main([str(runs[0]), place]) == 1
    assert "its test images have no 11 groups of two classes" in capsys.readouterr().err
    ids = iter((["a", "b"], ["a", "c"]))
    monkeypatch.setattr(probe, "probed", lambda folder, places: ({}, {}, next(ids)))
    assert probe.main([str(run) for run in runs]) == 1
    assert f"{runs[1]}: its test images are not those of {runs[0]}" in capsys.readouterr().err
