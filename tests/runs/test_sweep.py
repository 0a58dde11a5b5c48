"""Sweeps: rows as ordinary runs, the comparison beside the paper's numbers, the paper's tables."""

import csv
import importlib.util
import json
import textwrap
import urllib.error
import urllib.request

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import aebad_ablation, tile_ablation
from mmrjax import main, methods
from mmrjax.data.defects import held_out
from mmrjax.report import __main__ as report_program
from mmrjax.report import sweep as report_sweep
from mmrjax.runs import sweep
from mmrjax.runtime import config as config_lib


def with_rows(config, *rows, **fields):
    config = config.copy_and_resolve_references()
    config.sweep.update(rows=rows, **fields)
    return config


# --- the plan


def test_rows_differ_from_the_configuration_by_their_overrides_alone(tiny_config):
    config = with_rows(tiny_config, ("ratio 0.2", ("student.mask_ratio=0.2",), "figure only"))
    (row,) = sweep.plan(config)
    before, after = config_lib.flatten(config), config_lib.flatten(row.config)
    differing = {name for name in after if after[name] != before[name]}
    assert differing == {"student.mask_ratio", "sweep.rows", "title"}
    assert row.config.sweep.rows == ()
    assert row.folder == "ratio_0.2"


def test_the_row_that_changes_no_value_is_the_shared_default(tiny_config):
    rows = (("0.4", ("student.mask_ratio=0.4",), ""), ("0.2", ("student.mask_ratio=0.2",), ""))
    assert [row.folder for row in sweep.plan(with_rows(tiny_config, *rows))] == ["default", "0.2"]
    overridden = with_rows(tiny_config, *rows)
    overridden.student.mask_ratio = 0.2  # as --config.student.mask_ratio=0.2 does
    assert [row.folder for row in sweep.plan(overridden)] == ["0.4", "default"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", ("student.mask_rati=0",), "")], "did you mean student.mask_ratio"),
        ([("a", ("student.mask_ratio=2",), "")], "must lie between 0.0 and 0.99"),
        ([("a", (), (80.0,))], "row 'a': give a number of the paper for each of image_auroc, pro"),
        ([("a", (), ""), ("b", (), "")], "share a folder: default"),
        ([("a b", ("train.epochs=1",), ""), ("a/b", ("train.epochs=2",), "")], "folder: a_b"),
    ],
)
def test_rows_that_cannot_work_are_refused_before_any_is_run(tiny_config, tmp_path, rows, message):
    config = with_rows(tiny_config, ("good", ("train.epochs=9",), ""), *rows)
    with pytest.raises(ValueError, match=message):
        sweep.run(config, tmp_path, lambda *_: pytest.fail("a row was run"))


@pytest.mark.parametrize("override", ["teacher.weights=imagenet", "student.init=gone.npz"])
def test_missing_weights_are_told_before_any_row_is_run(
    override, tiny_config, tmp_path, monkeypatch
):
    def refuse(url, *args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("MMRJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # torch
    rows = (("good", ("train.epochs=9",), ""), ("late", (override,), ""))
    with pytest.raises(FileNotFoundError, match=r"resnet18-f37072fd\.pth is not|file at gone\.npz"):
        sweep.run(with_rows(tiny_config, *rows), tmp_path, lambda *_: pytest.fail("a row was run"))


def test_rows_cannot_be_given_on_the_command_line():
    with pytest.raises(ValueError, match=r"sweep\.rows: only a file declares it"):
        config_lib.load("configs/demo.py", ["sweep.rows=a"])


# --- the tables of the paper


def percent(name):
    return {label: numbers for label, _, numbers in aebad_ablation.get_config(name).sweep.rows}


def test_the_numbers_are_those_of_tables_7_to_9():
    assert percent("pretraining") == {"from scratch": (75.1, 88.5), "MAE": (84.7, 89.1)}
    assert percent("teacher") == {
        "random ResNet-18": (51.8, 52.8),
        "ResNet-18": (82.4, 90.7),
        "WideResNet-50-2": (84.7, 89.1),
    }
    assert percent("layers") == {
        "layer 1": (66.5, 85.6),
        "layer 2": (76.9, 86.6),
        "layer 3": (76.5, 82.4),
        "layers 1, 2": (74.7, 86.9),
        "layers 2, 3": (85.0, 88.1),
        "layers 1, 2, 3": (84.7, 89.1),
    }


@pytest.mark.parametrize("name", ["mask_form", "mask_ratio"])
def test_figures_give_no_numbers_but_for_the_default(name):
    values = list(percent(name).values())
    assert set(values) == {"figure only", (84.7, 89.1)}
    assert values.count((84.7, 89.1)) == 1


SPECS = [
    *(f"aebad_ablation.py:{name}" for name in aebad_ablation.TABLES),
    *(f"tile_ablation.py:{name}" for name in tile_ablation.TABLES),
]


@pytest.mark.parametrize("spec", SPECS)
def test_every_table_has_one_default_and_the_units_and_ratios_of_the_paper(spec):
    rows = sweep.plan(config_lib.load(f"configs/{spec}"))
    assert [row.folder for row in rows].count("default") == 1
    students = [row.config.student for row in rows]
    hidden = [s.mask_unit for s in students if s.mask_form == "pixel"]
    wanted = {"aebad_ablation.py:mask_form": [1, 2, 4, 8, 16, 32, 56, 112]}
    wanted["tile_ablation.py:mask_form"] = [16]
    assert hidden == wanted.get(spec, [])
    if "ratio" in spec:
        step = 10 if "aebad" in spec else 5
        assert [s.mask_ratio for s in students] == [i / step for i in range(step)]


# Networks small enough to be traced in half a second, where the row itself sets no other.
SMALL = (
    "teacher.name=resnet18",
    "student.size=",
    "student.width=24",
    "student.depth=1",
    "student.heads=3",
    "student.layers=3",
)


@pytest.mark.parametrize("name", aebad_ablation.TABLES)
def test_every_switch_of_section_6_builds_and_gives_its_layers_a_loss(name):
    """Traced, not compiled: that would take minutes."""
    config = aebad_ablation.get_config(name)
    config_lib.override(config, SMALL)
    for row in sweep.plan(config):
        assert loss_terms(row.config) == set(row.config.student.layers), row.label


@pytest.mark.parametrize("layers", [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)])
def test_any_subset_of_the_layers_can_be_reconstructed(layers):
    config = config_lib.load("configs/aebad_ablation.py", SMALL)
    config.student.layers = layers
    assert loss_terms(config) == set(layers)


def loss_terms(config) -> set[int]:
    """The layers of which the traced loss of a configuration has a term."""
    image, key = jnp.zeros((2, 224, 224, 3)), jax.random.key(0)
    batch = {"image": image, "weight": jnp.ones(2), "keys": jax.random.split(key)}
    method = methods.create("mmr", config)
    variables = jax.eval_shape(method.student.init, key, image)
    frozen = {"teacher": jax.eval_shape(method.teacher.module.init, key, image)}
    value, (_, logs) = jax.eval_shape(
        lambda v, f: method.loss("train", v, f, batch, key, {}), variables, frozen
    )
    assert value.shape == ()
    return {int(name.removeprefix("loss_layer")) for name in logs}


# --- running it

SWEEP = """
    from configs import folder
    def get_config():
        config = folder.get_config()
        config.title = "Neighbourhoods"
        config.method.names = ("patchcore",)
        config.sweep.rows = (
            ("1 patch", ("patchcore.patch=1",), "figure only"),
            ("3 | 3 patches", ("patchcore.patch=3",), (84.7, 89.1)),
        )
        config.sweep.source = "figure 12"
        return config
"""


@pytest.fixture(scope="module")
def finished(tiny_raw, tiny_fields, tmp_path_factory):
    """A complete sweep of two rows and two seeds, and its arguments."""
    home = tmp_path_factory.mktemp("sweep")
    (home / "patches.py").write_text(textwrap.dedent(SWEEP))
    args = [
        f"--config={home / 'patches.py'}",
        f"--workdir={home / 'run'}",
        *tiny_fields(tiny_raw, home / "records"),
        "--config.train.seeds=1,2",
    ]
    assert main.main(args) == 0
    return home / "run", args


def read(path):
    return json.loads(path.read_text())


def test_each_row_is_an_ordinary_run_with_its_own_report(finished):
    workdir, _ = finished
    for folder, patch in (("1_patch", 1), ("default", 3)):
        assert (workdir / folder / "report.html").exists()
        stored = read(workdir / folder / "patchcore/parts/seed1/config.json")
        assert stored["patchcore"]["patch"] == patch
        assert stored["sweep"]["rows"] == []


def test_the_comparison_holds_ours_and_the_papers(finished):
    workdir, _ = finished
    content = read(workdir / "results.json")
    one, three = content["rows"]
    assert [one["label"], three["label"]] == ["1 patch", "3 | 3 patches"]
    assert one["paper"] == "figure only"
    assert three["paper"] == {"image_auroc": 0.847, "pro_mmr": 0.891}
    for row, folder in ((one, "1_patch"), (three, "default")):
        own = read(workdir / folder / "results.json")["methods"]["patchcore"]["summary"]
        for name in ("image_auroc", "pro_mmr"):
            ours = row["methods"]["patchcore"]["metrics"][name]
            assert ours == {"mean": own[name]["mean"], "std": own[name]["std"]}
        assert row["methods"]["patchcore"]["seeds"] == [1, 2]
        assert row["report"] == f"{folder}/report.html"


def test_results_are_mean_and_sample_deviation_over_the_stated_seeds(finished):
    content = read(finished[0] / "default/results.json")["methods"]["patchcore"]
    assert [run["seed"] for run in content["runs"]] == [1, 2]
    for name in ("image_auroc", "pixel_auroc", "aupro_0.3", "pro_mmr"):
        value = content["metrics"]["folder/parts"]["all"][name]
        seeds = list(value["seeds"].values())
        assert value["mean"] == pytest.approx(np.mean(seeds))
        assert value["std"] == pytest.approx(np.std(seeds, ddof=1))


def test_table_page_and_terminal_say_the_same(finished, capsys):
    workdir, args = finished
    before = {p: p.read_bytes() for p in workdir.glob("*/patchcore/parts/seed*/results.json")}
    assert len(before) == 4
    assert main.main(args) == 0  # resumed: nothing is trained again
    assert {p: p.read_bytes() for p in before} == before
    head, one, three = capsys.readouterr().out.splitlines()[:3]
    assert head.split() == ["row", "image_auroc", "paper", "pro_mmr", "paper"]
    ours = read(workdir / "results.json")["rows"][1]["methods"]["patchcore"]["metrics"][
        "image_auroc"
    ]
    mean, std = f"{100 * ours['mean']:.1f}", f"{100 * ours['std']:.1f}"
    assert " ".join(three.split()).startswith(f"3 | 3 patches {mean} ± {std} 84.7")
    assert one.count("figure only") == 2
    markdown, html = ((workdir / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert f"| [3 \\| 3 patches](default/report.html) | {mean} ± {std} | 84.7 |" in markdown
    assert f"<td>{mean} ± {std}</td><td>84.7</td>" in html
    for page in (markdown, html):
        assert "figure only" in page
        assert "random weights" in page
        assert "metric mode" in page


def test_the_page_is_rendered_again_from_its_files(finished):
    page = finished[0] / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert report_program.main([f"--workdir={finished[0]}"]) == 0
    assert page.read_bytes() == before


def test_a_sweep_and_a_single_configuration_do_not_share_a_work_directory(finished, capsys):
    workdir, args = finished
    single = ["--config=configs/folder.py", *args[1:]]
    before = (workdir / "results.json").read_bytes()
    assert main.main(single) == 1
    assert "holds a sweep" in capsys.readouterr().err
    assert (workdir / "results.json").read_bytes() == before
    inside = [args[0], f"--workdir={workdir / 'default'}", *args[2:]]
    assert main.main(inside) == 1
    assert "holds runs of one configuration" in capsys.readouterr().err


def test_a_stopped_sweep_shows_the_rows_that_it_has(finished, tiny_config, tiny_raw, tmp_path):
    rows = (("first", ("train.epochs=1",), ""), ("second", ("train.epochs=2",), ""))
    runs = iter([finished[0] / "default"])

    def run_all(config, folder):
        try:
            source = next(runs)
        except StopIteration:
            raise KeyboardInterrupt from None
        folder.mkdir()
        (folder / "patchcore").symlink_to(source / "patchcore")
        return read(source / "results.json"), folder / "report.html"

    config = with_rows(tiny_config, *rows, average="images")
    config.data.raw_dir = str(tiny_raw)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(config, tmp_path, run_all)
    markdown = (tmp_path / "report.md").read_text()
    assert "| second | not run yet | not run yet |" in markdown
    assert "paper |" not in markdown  # no row has a number or a word of it
    pooled = read(finished[0] / "default/results.json")["methods"]["patchcore"]["metrics"][
        "folder/parts"
    ]
    assert f"| {100 * pooled['all']['image_auroc']['mean']:.1f}" in markdown


# --- judged without the test

JUDGED = (
    "--config.sweep.judge=held_out_defects",
    "--config.sweep.metrics=image_auroc,pixel_auroc",
    "--config.calibration.fraction=0",
)


def draw_parts(folder, defect_level):
    """20 good pictures, of which every fifth is kept for the test, and 4 with a square."""
    rng = np.random.default_rng(0)
    for kind, count in (("good", 20), ("bad", 4)):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            picture = np.clip(rng.normal(110, 12, (64, 72, 3)), 0, 255).astype(np.uint8)
            if kind == "bad":
                picture[20:34, 14 * i : 14 * i + 14] = defect_level
            cv2.imwrite(str(folder / kind / f"{i:02d}.png"), picture)
    return folder


@pytest.fixture(scope="module")
def judged(tiny_fields, tmp_path_factory):
    """(work directory, arguments) of two tables, whose data differ in the test alone."""
    tables = []
    for name, level in (("one", 240), ("other", 20)):
        home = tmp_path_factory.mktemp(name)
        fields = tiny_fields(draw_parts(home / "parts", level), home / "records")
        (home / "patches.py").write_text(textwrap.dedent(SWEEP))
        args = [f"--config={home / 'patches.py'}", f"--workdir={home / 'run'}", *fields, *JUDGED]
        assert main.main(args) == 0
        tables.append((home / "run", args))
    return tables


def test_a_judged_row_is_an_ordinary_run_that_says_how_it_was_judged(judged):
    run = judged[0][0] / "default/patchcore/parts/seed54"
    assert read(run / "config.json")["sweep"]["judge"] == "held_out_defects"
    (note,) = read(run / "results.json")["facts"]["notes"][1:]
    assert "judged without the test" in note
    defects = {row["defect"] for row in csv.DictReader((run / "scores.csv").open())}
    assert defects == {"good", *held_out.KINDS}


def test_another_test_changes_no_score_and_no_rank(judged):
    (one, _), (other, _) = judged
    name = "parts/bad/00.png"
    assert (one.parent / name).read_bytes() != (other.parent / name).read_bytes()
    scores = sorted(one.glob("*/patchcore/parts/seed54/scores.csv"))
    assert len(scores) == 2
    for path in scores:
        assert path.read_text() == (other / path.relative_to(one)).read_text()
    assert read(one / "results.json") == read(other / "results.json")


def test_a_judged_table_is_ranked_by_the_mean_of_its_metrics(judged):
    workdir, _ = judged[0]
    lines = [
        line.split()
        for line in report_sweep.text_table(
            read(workdir / "results.json"), methods.METHODS
        ).splitlines()
    ]
    assert lines[0] == ["row", "mean", "image_auroc", "pixel_auroc"]
    values = [[float(text) for text in line[-3:]] for line in lines[1:]]
    assert len(values) == 2
    means = [row[0] for row in values]
    assert means == sorted(means, reverse=True)
    assert means == pytest.approx([np.mean(row[1:]) for row in values], abs=0.1)
    markdown = (workdir / "report.md").read_text()
    assert "Ranked without the test" in markdown
    assert "paper |" not in markdown  # the paper's numbers are those of the test


def test_a_row_that_has_not_run_or_lacks_a_metric_is_ranked_last():
    def row(label, *means):
        names = ("image_auroc", "pixel_auroc")
        values = {n: {"mean": m, "std": None} for n, m in zip(names, means, strict=False)}
        methods = {"patchcore": {"metrics": values, "seeds": [1]}} if means else {}
        return {"label": label, "overrides": [], "paper": "", "report": None, "methods": methods}

    rows = [row("a"), row("b", 0.9, None), row("c", 0.6, 0.5), row("d", 0.7, 0.6)]
    content = {"judge": "held_out_defects", "metrics": ["image_auroc", "pixel_auroc"], "rows": rows}
    table = report_sweep.text_table(content, methods.METHODS)
    assert [line.split()[0] for line in table.splitlines()] == ["row", "d", "c", "a", "b"]
    assert "65.0" in table
    assert table.count("not run yet") == 3


def test_a_table_keeps_its_judge(judged, capsys):
    _, args = judged[0]
    assert main.main([*args, "--config.sweep.judge=test"]) == 1
    assert (
        "holds a table with sweep.judge=held_out_defects, this call has sweep.judge=test"
        in capsys.readouterr().err
    )


def test_other_metrics_rank_a_finished_table_without_another_run(judged, capsys):
    workdir, args = judged[1]
    scores = {path: path.stat().st_mtime_ns for path in workdir.glob("*/*/*/*/scores.csv")}
    assert len(scores) == 2
    assert main.main([*args, "--config.sweep.metrics=pixel_auroc"]) == 0
    head, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["row", "mean", "pixel_auroc"]
    assert {path: path.stat().st_mtime_ns for path in scores} == scores


def test_the_shown_table_of_settings_is_judged_without_the_test():
    rows = sweep.plan(config_lib.load("configs/folder_settings.py"))
    assert [row.folder for row in rows].count("default") == 1
    assert {row.config.sweep.judge for row in rows} == {"held_out_defects"}
