"""scripts/search.py: the set of training tiles with defects of another make, and the ranking."""

import csv
import importlib
import json
import pathlib
import sys
import threading

import cv2
import numpy as np
import pytest
from PIL import Image

from data_builders import build
from mmrjax import main, methods
from mmrjax.data import records as records_lib
from mmrjax.runtime import config as config_lib

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"
EVIDENCE = SCRIPTS.parent / "docs/evidence"
GROUPS, EACH = 20, 2  # tiles, and images of each


@pytest.fixture(scope="module")
def search():
    """The script as a module; scripts/ is on the path only for this file."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("search")
    sys.path.remove(str(SCRIPTS))


def surface(rng, h=110, w=100):
    """A grained grey surface."""
    grain = cv2.GaussianBlur(rng.normal(0, 40, (h, w)), (0, 0), 1.0)
    return np.clip(110 + grain, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Records as the magnetic tiles have them: groups of several exposures; and defective ones."""
    root, rng = tmp_path_factory.mktemp("raw") / "tile", np.random.default_rng(0)
    rows = [("image", "group", "domain")]
    for group in range(GROUPS):
        for exposure in range(EACH):
            rows.append((f"train/good/exp{exposure}_num_{group}.png", group, f"exp{exposure}"))
    rows.append(("test/crack/secret.png", "secret", "exp0"))
    for name, *_ in rows[1:]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), surface(rng))
    with (root / "groups.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (directory,) = build.build("folder", root, root.parent / "records").values()
    return directory


@pytest.fixture(scope="module")
def made(search, tiles, tmp_path_factory):
    """Two sets of one seed."""
    folders = [tmp_path_factory.mktemp(f"set{i}") / "search_set" for i in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.search_set.build, "build", lambda *_: {"tile": tiles})
        for folder in folders:
            sheet = f"--sheet={folder.parent / 'sheet.png'}"
            assert search.main(["make", "--data_dir=x", f"--output={folder}", sheet]) == 0
    return folders


# --- the set


def test_every_small_kind_changes_the_tile_where_its_mask_says(search):
    rng = np.random.default_rng(1)
    tile, donor = surface(rng, 180, 160), surface(rng, 120, 130)
    sheets = rng.integers(0, 256, (3, 128, 128), np.uint8)
    for kind in search.search_set.SMALL:
        sides = []
        for seed in range(4):
            one, again = (
                search.search_set.defective(np.random.default_rng(seed), tile, kind, donor, sheets)
                for _ in range(2)
            )
            np.testing.assert_array_equal(one[0], again[0])
            changed = np.abs(one[0].astype(int) - tile) > search.search_set.CHANGED
            assert (changed & one[1]).sum() >= 0.3 * one[1].sum() > 0, kind
            stray = cv2.connectedComponentsWithStats((changed & ~one[1]).astype(np.uint8))[2]
            assert stray[1:, cv2.CC_STAT_AREA].max(initial=0) < 4, kind
            sides.append(max(np.ptp(axis) + 1 for axis in np.nonzero(one[1])))
        assert 3 <= min(sides) < max(sides) <= 80, kind


@pytest.mark.parametrize("kind", ["shade", "band"])
def test_a_large_kind_covers_its_share_of_the_tile_and_little_else_changes(search, kind):
    tile = surface(np.random.default_rng(2), 180, 160)
    shares, lights = [], []
    for seed in range(12):
        one, again = (
            search.search_set.defective(np.random.default_rng(seed), tile, kind, tile, None)
            for _ in range(2)
        )
        np.testing.assert_array_equal(one[0], again[0])
        change, mask = one[0].astype(int) - tile, one[1]
        shares.append(mask.mean())
        lights.append(change[mask].mean())
        pieces = cv2.connectedComponentsWithStats(mask.astype(np.uint8))[2][1:]
        assert pieces[:, cv2.CC_STAT_AREA].min() >= 0.02 * mask.size
        assert np.abs(change[mask]).mean() > search.search_set.CHANGED
        assert (np.abs(change[~mask]) > 2 * search.search_set.CHANGED).mean() < 0.05
    assert 0.1 <= min(shares) < 0.2 < 0.35 < max(shares) <= 0.6
    assert min(lights) < -5 < 5 < max(lights)
    assert min(np.abs(lights)) < 2  # another texture under the same light


def test_a_large_kind_shows_on_a_plain_dark_tile(search):
    plain = np.full((100, 100), 3, np.uint8)  # without texture, and nothing can be darker
    for kind in search.search_set.LARGE:
        image, mask = search.search_set.defective(
            np.random.default_rng(0), plain, kind, plain, None
        )
        assert image[mask].mean() > 3 + search.search_set.CHANGED


def test_a_defect_that_cannot_show_is_refused(search):
    plain = np.full((100, 100), 90, np.uint8)
    with pytest.raises(ValueError, match="no smear can be seen on a tile of grey level 90"):
        search.search_set.defective(np.random.default_rng(0), plain, "smear", plain, None)


def test_the_set_splits_training_tiles_by_group_and_reads_no_test_image(search, made, tmp_path):
    (directory,) = build.build("folder", made[0], tmp_path).values()
    table = records_lib.load(directory).table
    groups = {split: set(table["group"][table["split"] == split]) for split in ("train", "test")}
    assert (len(groups["train"]), len(groups["test"])) == (15, 5)
    assert not groups["train"] & groups["test"]
    assert "secret" not in groups["train"] | groups["test"]
    assert set(table["domain"]) == {"exp0", "exp1"}
    defect, label = table["defect"], table["label"]
    assert (label[table["split"] == "train"] == records_lib.GOOD).all()
    assert set(defect) == {"good", *search.search_set.KINDS}
    counts = [(defect == kind).sum() for kind in search.search_set.KINDS]
    assert sum(counts) == 2 * 5 * EACH
    assert max(counts) - min(counts) <= 1
    assert table["has_mask"].all()


def test_the_format_does_not_tell_good_from_defective(made):
    paths = sorted(made[0].rglob("*.jpg"))
    tables = {str(Image.open(path).quantization) for path in paths}
    assert len(paths) == GROUPS * EACH + 2 * 5 * EACH
    assert len(tables) == 1
    assert {Image.open(path).mode for path in paths} == {"L"}


def test_a_set_depends_on_its_seed_alone_and_is_not_written_over(search, made, capsys):
    first, second = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in made
    )
    assert first == second
    assert search.main(["make", "--data_dir=x", f"--output={made[0]}"]) == 1
    assert "is there already; name another folder" in capsys.readouterr().err
    sheet = cv2.imread(str(made[0].parent / "sheet.png"))
    assert sheet.std() > 5


# --- candidates


def test_every_candidate_is_a_configuration_that_its_method_accepts(search):
    assert len(set(search.CANDIDATES)) == len(search.CANDIDATES) > 30
    assert set(search.CHANGES) == {c for name in search.CANDIDATES for c in name.split("+")[1:]}
    seen = {}
    for candidate in search.CANDIDATES:
        config = config_lib.load(search.SPEC, [*search.SEARCHED, *search.fields_of(candidate)])
        config_lib.validate(config, methods.METHODS)
        (name,) = config.method.names
        methods.create(name, config)
        assert config.data.name == "folder"
        seen.setdefault(str(config_lib.flatten(config)), []).append(candidate)
    assert all(len(names) == 1 for names in seen.values())  # no two are the same


@pytest.mark.parametrize("candidate", ["mmr+360", "mrm", ""])
def test_an_unknown_candidate_is_refused_with_those_known(search, candidate):
    with pytest.raises(ValueError, match=r"candidate .*: unknown '.*'; known: .*, "):
        search.fields_of(candidate)


# --- running


AUROCS = {"mmr": 0.7, "mmr+320": 0.8, "patchcore": 0.9}


class Program:
    """In place of mmrjax.main: image AUROC by candidate, runs that wait for each other."""

    def __init__(self, together=1, fail=()):
        self.calls, self.fail = [], fail
        self.barrier = threading.Barrier(together)

    def __call__(self, arguments, log):
        given = dict(a.removeprefix("--").removeprefix("config.").split("=", 1) for a in arguments)
        home = pathlib.Path(given["workdir"])
        name = home.parent.name
        self.calls.append(name)
        self.barrier.wait(timeout=30)
        print("a line", file=log)
        if name in self.fail:
            return 3
        folder = home / given["method.names"] / "search_set" / f"seed{given['train.seeds']}"
        folder.mkdir(parents=True)
        values = {"image_auroc": AUROCS[name], "pixel_auroc": 0.6, "aupro_0.3": 0.5}
        kinds = {"crack": {"images": 8, "image_auroc": 0.65, "missed_at_5": 0.75, "more": 1}}
        everything = {**values, "pro_mmr": 0.5, "tiny_recall": None, "defects": kinds}
        facts = {"teacher": {"name": "resnet18"}, "seconds": {"training": 120.0}}
        metrics = {"folder/search_set": {"all": everything}}
        (folder / "results.json").write_text(json.dumps({"metrics": metrics, "facts": facts}))
        rng = np.random.default_rng(0)
        with (folder / "scores.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "label", "domain", "group", "score"])
            for i in range(40):
                label = ("good", "anomaly")[i % 2]
                gain = 2 * AUROCS[name] * (i % 2)
                writer.writerow([i, label, "", i // 4, rng.normal() + gain])
        return 0


def call(search, made, folder, program, *more):
    names = "--candidates=mmr,mmr+320,patchcore"
    places = [f"--workdir={folder / 'runs'}", f"--evidence={folder / 'evidence'}"]
    records = f"--config.data.data_dir={made[0].parent / 'records'}"
    flags = ["run", f"--set={made[0]}", *places, names, records, *more]
    return search.main(flags, program)


def test_candidates_run_at_once_are_ranked_and_not_run_again(search, made, tmp_path, capsys):
    program = Program(together=3)
    assert call(search, made, tmp_path, program, "--jobs=3") == 0
    assert sorted(program.calls) == ["mmr", "mmr+320", "patchcore"]
    table = (tmp_path / "evidence/table.md").read_text()
    assert table in capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith(("| mmr", "| patchcore"))]
    assert [line.split()[1] for line in lines] == 2 * ["patchcore", "mmr+320", "mmr"]
    assert lines[0] == "| patchcore | 54 | 66.7 | 90.0 | 60.0 | 50.0 | 50.0 | – | 2.0 |"
    assert lines[2].startswith("| mmr | 54 | 60.0 | 70.0 (-20.0 [")
    assert lines[3] == "| patchcore | 65.0 / 25.0 |"
    content = json.loads((tmp_path / "evidence/mmr+320/seed54/results.json").read_text())
    assert content["fields"]["data.image_size"] == [320, 320]
    assert content["kinds"]["crack"] == {"images": 8, "image_auroc": 0.65, "missed_at_5": 0.75}
    assert len(content["scores"]) == 40
    texts = [path.read_text() for path in (tmp_path / "evidence").rglob("*.*")]
    assert not any(str(tmp_path) in text or str(made[0]) in text for text in texts)
    again = Program()
    assert call(search, made, tmp_path, again) == 0
    assert again.calls == []
    twice = ("--candidates=mmr,mmr", "--seeds=55,55")
    assert call(search, made, tmp_path, again, *twice) == 0
    assert again.calls == ["mmr"]
    assert call(search, made, tmp_path, again, "--config.train.batch_size=8") == 1
    assert "use another --evidence" in capsys.readouterr().err


def test_a_failed_candidate_is_named_and_tried_again_and_stops_no_other(
    search, made, tmp_path, capsys
):
    assert call(search, made, tmp_path, Program(fail=("patchcore",))) == 1
    out, err = capsys.readouterr()
    log = tmp_path / "runs/patchcore/seed54/log.txt"
    assert f"failed: patchcore, seed 54: exit status 3; see {log}" in err
    assert log.read_text() == "a line\n"
    assert "| mmr+320 | 54 | 63.3 | 80.0 |" in out  # there is nothing to compare with yet
    again = Program()
    assert call(search, made, tmp_path, again) == 0
    assert again.calls == ["patchcore"]


def test_wrong_flags_are_refused(search, made, tmp_path, capsys):
    assert call(search, made, tmp_path, Program(), "--candidates=mmr+9") == 1
    assert "unknown '9'" in capsys.readouterr().err
    assert call(search, made, tmp_path, Program(), "--jobs=0") == 1
    assert "--jobs=0: must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def look(search, folder, program, *more):
    places = [f"--workdir={folder / 'runs'}", f"--looks={folder / 'looks.csv'}"]
    return search.main(["look", "--why=the best, on all tiles", *places, *more], program)


def test_a_look_at_the_test_is_noted_and_a_failed_one_is_not(search, tmp_path, capsys):
    raw = "--config.data.raw_dir=tiles"
    program = Program()
    seen = []

    def start(arguments, log):
        seen.append(arguments)
        return program(arguments, log)

    assert look(search, tmp_path, start, "--candidate=patchcore", "--seed=3", raw) == 0
    assert "image_auroc 90.0, pixel_auroc 60.0" in capsys.readouterr().out
    assert raw in seen[0]
    assert not any("folder" in argument.split("=")[-1] for argument in seen[0][3:])  # the tiles
    assert look(search, tmp_path, Program(), "--candidate=mmr") == 0
    assert look(search, tmp_path, Program(fail=("mmr+320",)), "--candidate=mmr+320") == 1
    assert "mmr+320, seed 54: exit status 3; see" in capsys.readouterr().err
    with (tmp_path / "looks.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["what"], line["seed"]) for line in lines] == [("patchcore", "3"), ("mmr", "54")]
    assert lines[0]["image_auroc"] == "90.0"
    assert {line["why"] for line in lines} == {"the best, on all tiles"}


def test_a_real_candidate_on_a_small_set(search, made, tmp_path):
    """The program itself, in this process."""
    fields = ("teacher.weights=random", "data.image_size=64,64", "data.resize=64,64",
              "patchcore.width=16", "eval.bootstrap=20", "report.gallery=3")  # fmt: skip
    status = call(
        search,
        made,
        tmp_path,
        lambda arguments, log: main.main(arguments),
        "--candidates=patchcore",
        *(f"--config.{field}" for field in fields),
    )
    assert status == 0
    content = json.loads((tmp_path / "evidence/patchcore/seed54/results.json").read_text())
    assert set(content["kinds"]) == set(search.search_set.KINDS)
    assert all(0 <= content["metrics"][name] <= 1 for name in search.RANKED)
    images = json.loads((tmp_path / "evidence/images.json").read_text())["images"]
    assert len({group for *_, group in images}) == 5


# --- what is recorded


def test_every_look_of_the_grid_at_the_tiles_is_noted(search):
    with (EVIDENCE / "looks.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == search.ablate.LOOK_HEADS
    noted = {(*line["what"].split()[:2], line["seed"]): line for line in lines}
    runs = sorted((EVIDENCE / "magnetic_tile").glob("*/seed*/results.json"))
    assert runs
    for path in runs:
        content = json.loads(path.read_text())
        line = noted["grid", content["row"], str(content["seed"])]
        metrics = content["runs"]["magnetic_tile/tile"]["metrics"]["all"]
        for name in ("image_auroc", "pixel_auroc", "aupro_0.3", "pro_mmr"):
            assert line[name] == f"{100 * metrics[name]:.1f}", path
