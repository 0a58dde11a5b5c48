"""scripts/ablate.py: rows, pairs, intervals, resuming from evidence; a real grid on tiny data."""

import csv
import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest
from scipy import stats

from mmrjax import config as config_lib
from mmrjax import main, methods

SPEC = importlib.util.spec_from_file_location(
    "ablate", pathlib.Path(__file__).resolve().parent.parent / "scripts" / "ablate.py"
)
ablate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ablate)

GROUPS = 20


def flags(arguments):
    return dict(a.removeprefix("--").removeprefix("config.").split("=", 1) for a in arguments)


class Program:
    """In place of mmrjax.main: scores that are better by the number of switches that are on."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def __call__(self, arguments):
        given = flags(arguments)
        row, seed = pathlib.Path(given["workdir"]).parent.name, int(given["train.seeds"])
        if (row, seed) == self.fail_at:
            return 1
        self.calls.append((row, seed))
        folder = pathlib.Path(given["workdir"], given["method.names"], "parts", f"seed{seed}")
        folder.mkdir(parents=True)
        rng = np.random.default_rng(seed)
        noise, gain = rng.normal(0, 1, 2 * GROUPS), 1.0 + (row == "all")
        with (folder / "scores.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "label", "domain", "group", "score"])
            for i in range(2 * GROUPS):
                label, domain = ("good", "anomaly")[i % 2], ("dim", "lit")[i // GROUPS]
                writer.writerow([i, label, domain, i // 2, noise[i] + gain * (i % 2)])
        value = (
            0.5 + 0.01 * seed + 0.1 * (row == "all") + (0.02 if (row, seed) == ("all", 2) else 0)
        )
        metrics = {name: value for name in ablate.METRICS} | {"counts": {"images": 40}}
        domains = {domain: metrics for domain in ("all", "dim", "lit")}
        facts = {"teacher": {"name": "fdsl18"}, "seconds": {"training": 1.0}}
        result = {"metrics": {"folder/parts": domains}, "facts": facts}
        (folder / "results.json").write_text(json.dumps(result))
        return 0


def call(tmp_path, program, *more):
    arguments = [
        "--config=configs/demo.py",
        f"--workdir={tmp_path / 'run'}",
        f"--evidence={tmp_path / 'evidence'}",
        "--seeds=1,2,3",
        "--rows=hybrid,all",
        *more,
    ]
    return ablate.main(arguments, program)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, program = tmp_path_factory.mktemp("ablate"), Program()
    assert call(folder, program) == 0
    return folder, program


# --- rows


@pytest.mark.parametrize("grid", sorted(ablate.GRIDS))
@pytest.mark.parametrize("domain", ["supcon", "coral", "none"])
def test_every_row_is_a_configuration_that_its_method_accepts(grid, domain):
    for row, switches in ablate.rows_of(grid, domain).items():
        arguments = ablate.command("configs/demo.py", (), row, switches, pathlib.Path("x"), 3)
        fields = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
        config = config_lib.load("configs/demo.py", fields)
        config_lib.validate(config)
        (name,) = config.method.names
        assert name == ("mmr" if row in (ablate.BASE, ablate.LONGER) else "mmr_plus")
        assert config.train.epochs == (26 if row == ablate.LONGER else 20)
        assert config.train.seeds == (3,)
        methods.create(name, config)


def test_the_parts_switch_one_thing_at_a_time():
    rows = ablate.rows_of("parts", "supcon")
    names = ["base", "longer", "hybrid", "synthetic", "weight", "contrast", "domain", "all"]
    assert list(rows) == names
    on = {row: set(switches) for row, switches in rows.items()}
    assert on["hybrid"] == {"hybrid"}
    for row, own in {"weight": "tiny_weight", "contrast": "contrast", "domain": "domain"}.items():
        assert on[row] == {"synthetic_every", own}
    assert on["all"] == set(ablate.OFF)
    config = config_lib.load(
        "configs/demo.py", [f"mmr_plus.{k}={v}" for k, v in ablate.OFF.items()]
    )
    method = methods.create("mmr_plus", config)
    assert method.student.hybrid is None
    assert method.heads == {}


def test_data_of_one_domain_leave_out_the_alignment():
    rows = ablate.rows_of("parts", "none")
    assert "domain" not in rows
    assert rows["all"]["domain"] == "none"
    with pytest.raises(ValueError, match="--rows=domain: known are base, longer, hybrid"):
        ablate.rows_of("parts", "none", ["domain"])


# --- running


def test_seeds_are_run_in_pairs_and_leave_small_results(finished):
    folder, program = finished
    want = [(row, seed) for seed in (1, 2, 3) for row in ("base", "hybrid", "all")]
    assert program.calls == want
    path = folder / "evidence" / "all" / "seed2" / "results.json"
    content = json.loads(path.read_text())
    assert (content["row"], content["seed"]) == ("all", 2)
    assert content["fields"]["teacher.name"] == "fdsl18"
    assert not {"data.data_dir", "teacher.weights"} & content["fields"].keys()
    run = content["runs"]["folder/parts"]
    assert run["metrics"]["all"]["image_auroc"] == pytest.approx(0.64)
    assert len(run["scores"]) == 2 * GROUPS
    assert path.stat().st_size < 5000
    assert str(folder) not in path.read_text()


def test_what_is_in_evidence_is_not_run_again_even_without_the_work_directory(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "evidence").symlink_to(folder / "evidence")
    before = (folder / "evidence/table.md").read_text()
    again = Program()
    assert call(tmp_path, again) == 0
    assert again.calls == []
    assert (folder / "evidence/table.md").read_text() == before


def test_a_failed_run_stops_the_grid_and_the_same_call_continues(tmp_path, capsys):
    assert call(tmp_path, Program(fail_at=("hybrid", 2))) == 1
    assert "| hybrid | 1 |" in capsys.readouterr().out
    again = Program()
    assert call(tmp_path, again) == 0
    assert again.calls[0] == ("hybrid", 2)
    assert len(again.calls) == 5


def test_other_fields_and_other_images_are_refused(finished, capsys):
    folder, _ = finished
    assert call(folder, Program(), "--config.train.epochs=3") == 1
    assert "use another --evidence" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lists other test images"):
        ablate.check_images({"folder/parts": []}, folder / "evidence" / "images.json")


# --- the table


def test_the_table_holds_means_paired_differences_and_both_intervals(finished):
    text = (finished[0] / "evidence/table.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "| " in line}
    assert text.startswith("## folder/parts\n")
    base, hybrid, best = (lines[row] for row in ("base", "hybrid", "all"))
    assert base.startswith("| base | 52.0 |")  # of the second table, the first one's is above
    first = next(line for line in text.splitlines() if line.startswith("| all |"))
    gaps = np.array([0.1, 0.12, 0.1])
    half = stats.t.ppf(0.975, 2) * gaps.std(ddof=1) / 3**0.5
    ends = f"[{100 * (gaps.mean() - half):+.1f}, {100 * (gaps.mean() + half):+.1f}"
    assert f"| 1, 2, 3 | 62.7 (+10.7 {ends} \\| " in first
    assert f"62.7 (+10.7 {ends}])" in first  # a pixel metric, over seeds alone
    assert "(+0.0 [+0.0, +0.0" in hybrid
    assert best.count("+10.7") == 2  # two domains


def test_a_metric_that_older_evidence_lacks_is_not_in_the_table(finished, tmp_path):
    """A mean over fewer seeds than the row names would be none of that row."""
    evidence = tmp_path / "evidence"
    shutil.copytree(finished[0] / "evidence", evidence)
    assert "| tiny_recall |" in (evidence / "table.md").read_text()
    path = evidence / "all/seed2/results.json"
    content = json.loads(path.read_text())
    del content["runs"]["folder/parts"]["metrics"]["all"]["tiny_recall"]
    path.write_text(json.dumps(content))
    ablate.write_table(evidence, ablate.rows_of("parts", "supcon", ["hybrid", "all"]))
    heads = (evidence / "table.md").read_text().splitlines()[4]
    assert heads == "| row | seeds | image_auroc | pixel_auroc | aupro_0.3 | pro_mmr |"


def test_a_call_for_some_rows_keeps_the_others_in_the_table(tmp_path):
    assert call(tmp_path, Program()) == 0
    assert call(tmp_path, Program(), "--rows=synthetic", "--seeds=1") == 0
    lines = (tmp_path / "evidence/table.md").read_text().splitlines()[6:10]
    rows = [line.split(" | ")[:2] for line in lines]
    assert rows == [["| base", "1, 2, 3"], ["| hybrid", "1, 2, 3"], ["| synthetic", "1"],
                    ["| all", "1, 2, 3"]]  # fmt: skip


def test_a_run_that_leaves_no_results_where_they_belong_is_an_error(tmp_path, capsys):
    assert call(tmp_path, lambda arguments: 0) == 1
    assert "holds no results; fields of eval" in capsys.readouterr().err
    assert not (tmp_path / "evidence/base").exists()


def test_intervals_of_pairs():
    assert ablate.paired([1.0], [0.5]) == (0.5, None)
    mean, (low, high) = ablate.paired([0.3, 0.5, 0.4], [0.1, 0.1, 0.1])
    want = stats.ttest_rel([0.3, 0.5, 0.4], [0.1, 0.1, 0.1]).confidence_interval()
    assert mean == pytest.approx(0.3)
    np.testing.assert_allclose([low, high], [want.low, want.high])
    one_class = [[str(i), "good", "", str(i)] for i in range(3)]
    assert ablate.over_groups(np.ones((1, 3)), np.ones((1, 3)), one_class) is None


def test_every_run_on_test_images_is_noted_where_asked(tmp_path):
    looks = tmp_path / "looks.csv"
    assert call(tmp_path, Program(), "--seeds=1,2", f"--looks={looks}") == 0
    assert call(tmp_path, Program(), "--seeds=3", f"--looks={looks}") == 0
    lines = list(csv.DictReader(looks.read_text().splitlines()))
    metrics = {name: float(lines[0][name]) / 100 for name in ablate.METRICS}
    ablate.note_look(looks, "grid base", 1, metrics, lines[0]["why"])  # again: nothing new
    assert lines == list(csv.DictReader(looks.read_text().splitlines()))
    assert tuple(lines[0]) == ablate.LOOK_HEADS
    assert [(line["what"], line["seed"]) for line in lines] == [
        (f"grid {row}", seed) for seed in "123" for row in ("base", "hybrid", "all")
    ]
    assert lines[2]["image_auroc"] == "61.0"
    assert lines[2]["why"] == "configs/demo.py, folder/parts"


def test_several_runs_at_once_give_the_same_table_and_none_runs_twice(finished, tmp_path):
    folder, _ = finished
    program = Program()
    assert call(tmp_path, program, "--jobs=3", "--seeds=1,2,2,3,1") == 0
    assert len(program.calls) == len(set(program.calls)) == 9
    tables = [(where / "evidence/table.md").read_text() for where in (folder, tmp_path)]
    assert tables[0] == tables[1]


def test_an_exception_in_one_run_starts_no_other(tmp_path, capsys):
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence/images.json").write_text('{"other": []}')
    program = Program()
    assert call(tmp_path, program, "--jobs=2") == 1
    assert len(program.calls) < 9
    assert "lists other test images" in capsys.readouterr().err


def test_fields_of_other_methods_do_not_matter_and_others_are_named(tmp_path, capsys):
    assert call(tmp_path, Program(), "--config.patchcore.width=64") == 0
    again = Program()
    assert call(tmp_path, again, "--config.patchcore.width=128") == 0
    assert again.calls == []
    assert call(tmp_path, again, "--config.train.epochs=3") == 1
    assert (
        "fields {'train.epochs': 20}, this call has {'train.epochs': 3}" in capsys.readouterr().err
    )


def test_a_real_grid_on_tiny_data(tiny_raw, tiny_fields, tmp_path):
    """Two rows of the program itself."""
    status = ablate.main(
        [
            "--config=configs/folder.py",
            f"--workdir={tmp_path / 'run'}",
            f"--evidence={tmp_path / 'evidence'}",
            *tiny_fields(tiny_raw, tmp_path / "records"),
            "--config.train.epochs=2",
            "--seeds=1",
            "--rows=hybrid",
        ],
        main.main,
    )
    assert status == 0
    table = (tmp_path / "evidence/table.md").read_text()
    assert "| hybrid | 1 | " in table
    texts = [path.read_text() for path in (tmp_path / "evidence").rglob("*.json")]
    assert len(texts) == 3
    assert not any(str(tmp_path) in text for text in texts)
