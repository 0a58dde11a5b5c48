"""Every data set's config runs end to end, on small trees of the published layouts (PatchCore)."""

import json

import numpy as np
import pytest

from mmrjax import main
from mmrjax.data import tracks
from mmrjax.runs import records
from mmrjax.runtime import config as config_lib
from mmrjax.train import loop


@pytest.fixture
def run(tiny_fields, tmp_path):
    def run(config, raw_dir, *extra):
        fields = tiny_fields(raw_dir, tmp_path / "records")
        args = [f"--config={config}", f"--workdir={tmp_path / 'run'}", *fields]
        assert main.main([*args, "--config.method.names=patchcore", *extra]) == 0
        return json.loads((tmp_path / "run" / "results.json").read_text())["methods"]["patchcore"]

    return run


def test_mvtec_runs_all_categories_in_turn_and_gives_their_mean(run, mvtec_ad):
    result = run("configs/mvtec.py", mvtec_ad)
    assert set(result["metrics"]) == {"mvtec_ad/bottle", "mvtec_ad/grid"}
    each = [m["all"]["image_auroc"]["mean"] for m in result["metrics"].values()]
    assert result["summary"]["image_auroc"]["mean"] == pytest.approx(np.mean(each))


def test_mvtec_runs_one_category(run, mvtec_ad):
    assert set(run("configs/mvtec.py:bottle", mvtec_ad)["metrics"]) == {"mvtec_ad/bottle"}


def test_aebad_images_are_reported_per_domain_with_the_gap_to_same(run, aebad):
    result = run("configs/aebad.py", aebad)
    domains = result["metrics"]["aebad/s"]
    assert set(domains) == {"all", "same", "background", "illumination", "view"}
    value = {name: domains[name]["image_auroc"]["mean"] for name in domains}
    shifted = np.mean([value[d] for d in ("background", "illumination", "view")])
    gap = result["summary"]["image_auroc"]["gap_to_reference"]
    assert gap == pytest.approx(shifted - value["same"])


def test_aebad_videos_have_image_metrics_only_and_say_why(run, aebad):
    domains = run("configs/aebad.py:v", aebad)["metrics"]["aebad/v"]
    assert set(domains) == {"all", "video1", "video2"}
    assert domains["video1"]["image_auroc"]["mean"] is not None
    assert domains["video1"]["pixel_auroc"]["mean"] is None
    assert domains["video1"]["reasons"]["pixel_auroc"] == "no pixel ground truth"


@pytest.mark.parametrize(
    ("name", "category"),
    [("visa", "pcb1"), ("btad", "02"), ("kolektor_sdd2", "surface"), ("rsdds", "i")],
)
def test_other_data_sets_give_image_and_pixel_metrics(run, request, name, category):
    result = run(f"configs/{name}.py", request.getfixturevalue(name))
    values = result["metrics"][f"{name}/{category}"]["all"]
    assert values["image_auroc"]["mean"] is not None
    assert values["pixel_auroc"]["mean"] is not None


def test_one_model_for_all_categories_is_reported_by_category(run, mvtec_ad):
    result = run("configs/mvtec.py", mvtec_ad, "--config.data.protocol=one_for_all")
    assert set(result["metrics"]) == {"mvtec_ad/all"}
    domains = result["metrics"]["mvtec_ad/all"]
    assert set(domains) == {"all", "bottle", "grid"}
    each = [domains[category]["image_auroc"]["mean"] for category in ("bottle", "grid")]
    assert result["summary"]["image_auroc"]["mean"] == pytest.approx(np.mean(each))


def test_k_shot_trains_on_as_many_images_as_it_says(run, mvtec_ad, monkeypatch):
    seen = []
    real = loop.train

    def spy(method, records, *args, **kwargs):
        seen.append(len(records))
        return real(method, records, *args, **kwargs)

    monkeypatch.setattr(loop, "train", spy)
    few = ("--config.data.protocol=k_shot", "--config.data.shots=1")
    run("configs/mvtec.py:bottle", mvtec_ad, *few)
    assert seen == [1]


def test_unknown_category_lists_the_known(mvtec_ad, tmp_path, capsys):
    args = ["--config=configs/mvtec.py:skrew", f"--workdir={tmp_path}"]
    fields = [f"--config.data.raw_dir={mvtec_ad}", f"--config.data.data_dir={tmp_path}"]
    assert main.main([*args, *fields]) == 1
    assert "screw" in capsys.readouterr().err


def test_two_data_sets_train_one_model_and_have_a_mean_each(mvtec_ad, visa, tiny_fields, tmp_path):
    """MALA, two stages, and the images of an epoch as MALA counts them."""
    args = [
        "--config=configs/mvtec_visa.py",
        f"--workdir={tmp_path / 'run'}",
        *tiny_fields("", tmp_path / "records"),
        f"--config.raw_dirs.mvtec_ad={mvtec_ad}",
        f"--config.raw_dirs.visa={visa}",
        "--config.mala.epochs=1,2",
    ]
    assert main.main(args) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]["mala"]
    summary, (table,) = result["summary"]["image_auroc"], result["metrics"].values()
    assert set(summary["datasets"]) == {"mvtec_ad", "visa"}
    names = [name for name in table if name.startswith("mvtec_ad/")]
    own = np.mean([table[name]["image_auroc"]["mean"] for name in names])
    assert summary["datasets"]["mvtec_ad"] == pytest.approx(own)
    (log,) = (tmp_path / "run").glob("mala/*/seed0/" + loop.LOG)
    lines, categories = log.read_text().splitlines(), len(table) - 1
    first, second = categories, -(-10 * categories // 8)  # dropped, padded
    assert len(lines) == first + 2 * second
    defects = [json.loads(line)["defects"] for line in lines[first:]]
    assert sum(defects[:second]) == sum(defects[second:]) == 8 * categories  # 0.8 of 10 each


def test_kolektor_and_tiles_take_few_images_of_one_data_set(kolektor_sdd2, mvtec_ad, tmp_path):
    """The configuration, with a part of MVTec in the place of the tiles."""
    fields = [
        "data.join=kolektor_sdd2,mvtec_ad/grid",
        "data.target=mvtec_ad/grid",
        "data.shots=1",
        f"data.data_dir={tmp_path / 'records'}",
        f"raw_dirs.kolektor_sdd2={kolektor_sdd2}",
        f"raw_dirs.mvtec_ad={mvtec_ad}",
    ]
    config = config_lib.load("configs/kolektor_tiles.py", fields)
    (joined,) = records.load_records(config)
    chosen, whole = tracks.select(joined, config.data, 0), tracks.part_of(joined)
    counts = dict(zip(*np.unique(whole[chosen.train], return_counts=True), strict=True))
    assert counts["mvtec_ad/grid"] == 1
    assert counts["kolektor_sdd2/surface"] > 1
    assert len(set(whole[chosen.test])) == 2
