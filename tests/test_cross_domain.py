"""Several data sets train one model: the whole program on small trees, tracks, dark and labels."""

import csv
import json
import pathlib

import cv2
import numpy as np
import pytest

from mmrjax import main, methods
from mmrjax.data import tracks
from mmrjax.data.defects import bank, synthesise
from mmrjax.runtime import config as config_lib
from mmrjax.train import loop

RNG = np.random.default_rng(0)
CONDITIONS = ("same", "background", "illumination", "view")
HELD_OUT = "aebad/s:groove:illumination,rsdds/i:*:dark"


def write_pair(folder, name, mark, truth="", grey=120):
    """A picture of noise, and with `mark` a black square and its mask."""
    pixels = np.clip(RNG.normal(grey, 10, (64, 64, 3)), 0, 255).astype(np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    if mark:
        y, x = RNG.integers(6, 46, 2)
        mask[y : y + 12, x : x + 12] = 255
        pixels[mask > 0] = 0
        (truth / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(truth / name), mask)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / name), pixels)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """AeBAD-S and RSDDs in their published layouts, three pictures of a kind; ten strips."""
    home = tmp_path_factory.mktemp("raw")
    aebad = home / "AeBAD" / "AeBAD_S"
    for i in range(8):
        write_pair(aebad / "train/good/view", f"{i}.png", False)
    for i in range(3):
        for condition in CONDITIONS:
            write_pair(aebad / "test/good" / condition, f"{i}.png", False)
            truth = aebad / "ground_truth/groove" / condition
            write_pair(aebad / "test/groove" / condition, f"{i}.png", True, truth)
    folder = home / "rsdds" / "RSDDs dataset" / "Type-I RSDDs dataset"
    for i in range(10):
        strip = np.clip(RNG.normal(70 + 12 * i, 8, (800, 160)), 0, 255).astype(np.uint8)
        mask = np.zeros_like(strip)
        mask[40:60, 30:60] = 255
        strip[mask > 0] = 255
        for name, pixels in (("Rail surface images", strip), ("GroundTruth", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name / f"rail_{i + 1}.jpg"), pixels)
    return home


@pytest.fixture(scope="module")
def arguments(raw, tiny_fields, tmp_path_factory):
    """(workdir, *more) -> a command line on both data sets, whose records are built once."""
    records = tmp_path_factory.mktemp("records")

    def build(workdir, *more, config="configs/cross_domain.py", sets=("aebad", "rsdds")):
        places = {"aebad": raw / "AeBAD", "rsdds": raw / "rsdds"}
        return [
            f"--config={config}",
            f"--workdir={workdir}",
            *tiny_fields("", records),
            "--config.data.join=aebad/s,rsdds,folder",
            *(f"--config.raw_dirs.{name}={places[name]}" for name in sets),
            "--config.train.epochs=1",
            "--config.method.names=patchcore",
            *(f"--config.{field}" for field in more),
        ]

    return build


LABELLED = (
    f"data.held_out={HELD_OUT}",
    "train.seeds=0",
    "method.names=mmr_plus,patchcore",
    "mmr_plus.defect_labelled=1.0",
    "eval.bootstrap=20",
)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """(work directory, command line, records that trained and labelled ones) of track B."""
    home = tmp_path_factory.mktemp("cross") / "run"
    seen = []
    real = loop.train

    def spy(method, records, seed, folder, only, labelled, store):
        seen.append((records, labelled))
        trained = real(method, records, seed, folder, only, labelled, store)
        assert set(trained.frozen) == {"teacher"}  # labelled defects are not kept to score with
        return trained

    args = arguments(home, *LABELLED, config="configs/cross_domain.py:labelled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", spy)
        assert main.main(args) == 0
    return home, args, seen


def scores(run):
    with (run / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read(path):
    return json.loads(path.read_text())


def run_of(home, method="patchcore", seed=0):
    return home / method / "all" / f"seed{seed}"


def test_results_are_told_by_data_set_and_by_combination(finished):
    home, _, _ = finished
    for method in ("mmr_plus", "patchcore"):
        result = read(run_of(home, method) / "results.json")
        assert set(result["metrics"]["aebad+rsdds/all"]) == {"all", "aebad/s", "rsdds/i"}
        unseen = {(c["part"], c["condition"], c["defect"]) for c in result["combinations"]
                  if c["unseen"]}  # fmt: skip
        assert unseen == {("aebad/s", "illumination", "groove"), ("rsdds/i", "dark", "anomaly")}
        places = {(c["part"], c["condition"]) for c in result["combinations"]}
        assert places == {*(("aebad/s", c) for c in CONDITIONS), ("rsdds/i", ""),
                          ("rsdds/i", "dark")}  # fmt: skip
        kinds = result["metrics"]["aebad+rsdds/all"]["aebad/s"]["defects"]
        assert kinds["groove"]["images"] == 6  # one of three a condition, all of illumination
    summary = read(home / "results.json")["methods"]["patchcore"]["summary"]["image_auroc"]
    domains = result["metrics"]["aebad+rsdds/all"]
    each = [domains[part]["image_auroc"] for part in ("aebad/s", "rsdds/i")]
    assert summary["mean"] == pytest.approx(np.mean(each))


def test_no_group_is_on_two_sides_and_nothing_held_out_trains(finished):
    home, _, seen = finished
    tested = {row["id"]: row for row in scores(run_of(home))}
    for good, labelled in seen:
        assert (good.table["label"] == 0).all()
        assert (labelled.table["label"] == 1).all()
        columns = ("group", "part", "defect", "condition")
        table = {k: np.concatenate([x.table[k] for x in (good, labelled)]) for k in columns}
        assert not set(table["group"].tolist()) & {r["group"] for r in tested.values()}
        kinds = set(zip(table["part"], table["defect"], table["condition"], strict=True))
        assert ("aebad/s", "groove", "illumination") not in kinds
        assert not any(part == "rsdds/i" and condition == "dark" for part, _, condition in kinds)
        assert {("aebad/s", "groove"), ("rsdds/i", "anomaly")} <= {kind[:2] for kind in kinds}
        assert set(labelled.table["part"]) == {"aebad/s", "rsdds/i"}
    assert {row["condition"] for row in tested.values()} == {*CONDITIONS, "", "dark"}


def test_labelled_defects_are_counted_in_the_run_and_held_by_mmr_plus_alone(finished):
    home, *_ = finished
    facts = read(run_of(home, "mmr_plus") / "results.json")["facts"]
    counts = facts["labelled_defects"]
    assert counts["aebad/s"] == {"groove": 6}  # two of three in three conditions
    assert set(counts["rsdds/i"]) == {"anomaly"}
    assert "labelled_defects" not in read(run_of(home) / "results.json")["facts"]
    log = [json.loads(x) for x in (run_of(home, "mmr_plus") / "metrics.jsonl").open()]
    assert all(0 <= line["defects"] <= 2 for line in log)  # two synthetic rows of eight
    assert max(line["defects"] for line in log) > 0
    kinds = {name for name in log[0] if name.startswith("defects_")}
    assert kinds == {f"defects_{kind}" for kind in (*synthesise.TRAINING, "real")}
    assert all(sum(line[kind] for kind in kinds) == line["defects"] for line in log)


def test_labelled_pictures_are_trained_on_as_they_are(arguments, tmp_path, capsys):
    fields = (*LABELLED, "method.names=mmr_plus", "mmr_plus.labelled_target=inpaint")
    args = arguments(tmp_path, *fields, config="configs/cross_domain.py:labelled")
    assert main.main(args) == 0
    run = run_of(tmp_path, "mmr_plus")
    facts = read(run / "results.json")["facts"]
    assert facts["labelled_pictures"]["aebad/s"] == {"groove": 6}
    assert "labelled_defects" not in facts
    log = [json.loads(x) for x in (run / "metrics.jsonl").open()]
    assert sum(line["defects_real"] for line in log) > 0
    other = [arg.replace("=inpaint", "=ignore") for arg in args]
    assert main.main(other) == 1
    assert "labelled_target" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["report.md", "report.html"])
def test_the_report_has_the_tables(finished, page):
    text = (finished[0] / page).read_text().replace("\\_", "_")
    for said in ("Missed, by kind of defect", "Defects under conditions", "kept out", "aebad/s",
                 "rsdds/i, anomaly", "illumination", "missed at 1 %"):  # fmt: skip
        assert said in text, said


def test_the_same_command_does_nothing_and_dark_images_are_another_view(
    finished, arguments, monkeypatch
):
    home, args, _ = finished
    before = (run_of(home) / "results.json").read_text()
    assert main.main([*args, "--config.method.names=patchcore"]) == 0
    assert (run_of(home) / "results.json").read_text() == before
    dark = [*args, "--config.method.names=patchcore", "--mode=evaluate",
            "--config.eval.stress=dark"]  # fmt: skip
    monkeypatch.delattr(bank, "cut_out")  # their folder may be gone by then
    assert main.main(dark) == 0
    view_root = home / "evaluations" / "dark"
    view = run_of(view_root)
    bright, stressed = scores(run_of(home)), scores(view)
    labels = [[row[name] for name in ("id", "label", "group")] for row in bright]
    assert labels == [[row[name] for name in ("id", "label", "group")] for row in stressed]
    assert [row["score"] for row in bright] != [row["score"] for row in stressed]
    assert (run_of(home) / "results.json").read_text() == before
    for name in ("labelled_defects", "labelled_too_large"):  # noted, not cut out again
        facts = [read(run_of(x, "mmr_plus") / "results.json")["facts"] for x in (home, view_root)]
        assert facts[0][name] == facts[1][name]
    assert "stress: dark" in read(view / "results.json")["facts"]["eval"]["view"]


def test_the_split_follows_the_seed_or_its_own(arguments, tmp_path):
    fields = (f"data.held_out={HELD_OUT}", "train.seeds=0,1", "eval.bootstrap=0")
    assert main.main(arguments(tmp_path / "own", *fields)) == 0
    ids = [[row["id"] for row in scores(run_of(tmp_path / "own", seed=s))] for s in (0, 1)]
    assert ids[0] != ids[1]
    assert main.main(arguments(tmp_path / "fixed", *fields, "data.split_seed=1")) == 0
    fixed = [[row["id"] for row in scores(run_of(tmp_path / "fixed", seed=s))] for s in (0, 1)]
    assert fixed[0] == fixed[1] == ids[1]
    again = scores(run_of(tmp_path / "fixed", seed=1))
    assert again == scores(run_of(tmp_path / "own", seed=1))  # the same, to the last bit


def test_track_a_keeps_the_published_test(arguments, tmp_path):
    args = arguments(tmp_path / "a", config="configs/cross_domain.py:a")
    assert main.main(args) == 0
    rows = scores(run_of(tmp_path / "a", seed=54))
    assert len(rows) == 2 * 3 * len(CONDITIONS)
    assert {row["domain"] for row in rows} == {"aebad/s"}
    combinations = read(run_of(tmp_path / "a", seed=54) / "results.json")["combinations"]
    assert {c["condition"] for c in combinations} == {*CONDITIONS}
    assert not any(c["unseen"] for c in combinations)


def test_one_data_set_is_the_same_as_alone_bit_for_bit(arguments, tmp_path, raw, tiny_fields):
    fields = (
        "data.protocol=one_class",
        "data.held_out=",
        "train.seeds=3",
        "method.names=mmr,patchcore",
    )
    joined = arguments(tmp_path / "joined", *fields, sets=("aebad",))
    assert main.main(joined) == 0
    records = next(x for x in joined if x.startswith("--config.data.data_dir=")).split("=", 1)[1]
    alone = [
        "--config=configs/aebad.py",
        f"--workdir={tmp_path / 'alone'}",
        *tiny_fields(raw / "AeBAD", records),
        "--config.train.epochs=1",
        "--config.train.seeds=3",
        "--config.method.names=mmr,patchcore",
    ]
    assert main.main(alone) == 0
    for method in ("mmr", "patchcore"):
        a, b = (tmp_path / side / method / "s" / "seed3" for side in ("joined", "alone"))
        assert (a / "scores.csv").read_bytes() == (b / "scores.csv").read_bytes()
        assert read(a / "results.json")["metrics"] == read(b / "results.json")["metrics"]


def test_data_sets_without_a_folder_are_left_out_in_one_line(arguments, tmp_path, caplog):
    args = arguments(tmp_path / "a", config="configs/cross_domain.py:a", sets=("aebad",))
    assert main.main(args) == 0
    (line,) = [m for m in caplog.messages if m.startswith("left out")]
    assert line == (
        "left out for want of a folder: rsdds, folder (--config.raw_dirs.rsdds=…, "
        "--config.raw_dirs.folder=…)"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ((), "none of the data sets of data.join is at hand; give --config.raw_dirs.aebad=…"),
        (("raw_dirs.rsdds=/nowhere", "data.data_dir=/tmp/none"), "(here: --config.raw_dirs.rsdds"),
        (("data.join=aebed",), "unknown data set 'aebed'"),
        (("data.join=aebad,aebad",), "give different ones"),
        (("data.held_out=demo/blade:groove:dark",), "unknown data set 'demo'"),
        (("data.held_out=aebad/s:groove",), "'aebad/s:groove' is no combination"),
        (("data.protocol=one_class",), "only protocol=track_b holds combinations out"),
        (("data.held_out=", "data.labelled=true", "data.protocol=track_a"), "labelled defects"),
        (("raw_dirs.aebed=/x",), "no such field; did you mean raw_dirs.aebad"),
        (("data.protocol=one_for_all", "data.held_out="), "take protocol one_class or a track"),
    ],
)
def test_bad_input_is_one_line(arguments, tmp_path, capsys, fields, said):
    args = arguments(tmp_path / "run", *fields, sets=())
    assert main.main(args) == 1
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


@pytest.mark.parametrize("track", ["a", "b", "labelled"])
def test_the_configuration_builds(track):
    config = config_lib.load(f"configs/cross_domain.py:{track}")
    config_lib.validate(config, methods.METHODS)
    assert config.data.labelled == (track == "labelled")
    held_out = tracks.combinations(config.data.held_out)
    assert len(held_out) == (0 if track == "a" else 9)
    names = {name for name, _, _ in held_out}
    assert all(pathlib.PurePath(name).parts[0] in {n.split("/")[0] for n in config.data.join}
               for name in names)  # fmt: skip


def test_the_folders_that_can_be_given_are_those_of_the_builders():
    from data_builders import build

    config = config_lib.load("configs/cross_domain.py")
    drawn = {name for name in build.BUILDERS if build.load_builder(name).PROCEDURAL}
    assert set(config.raw_dirs) == set(build.BUILDERS) - drawn
