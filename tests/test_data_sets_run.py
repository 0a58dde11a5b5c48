"""Every data set's config runs end to end, on small trees of the published layouts (PatchCore)."""

import json

import cv2
import numpy as np
import pytest

from mmrjax import main
from mmrjax.train import loop

RNG = np.random.default_rng(0)


def write_image(path, mark=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.clip(RNG.normal(120, 10, (40, 48, 3)), 0, 255).astype(np.uint8)
    if mark:
        image[8:20, 8:20] = 255
    cv2.imwrite(str(path), image)


def write_mask(path, value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((40, 48), np.uint8)
    mask[8:20, 8:20] = value
    cv2.imwrite(str(path), mask)


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory):
    root = tmp_path_factory.mktemp("mvtec_ad")
    for category in ("screw", "tile"):
        for i in range(4):
            write_image(root / category / f"train/good/{i:03d}.png")
        for i in range(2):
            write_image(root / category / f"test/good/{i:03d}.png")
            write_image(root / category / f"test/hole/{i:03d}.png", mark=True)
            write_mask(root / category / f"ground_truth/hole/{i:03d}_mask.png")
    return root


@pytest.fixture(scope="module")
def aebad(tmp_path_factory):
    root = tmp_path_factory.mktemp("AeBAD")
    for i in range(4):
        write_image(root / f"AeBAD_S/train/good/view/{i}.png")
        write_image(root / f"AeBAD_V/train/good/video1_train/{i}.jpg")
    for i in range(2):
        for domain in ("same", "background", "illumination", "view"):
            write_image(root / f"AeBAD_S/test/good/{domain}/{i}.png")
            write_image(root / f"AeBAD_S/test/groove/{domain}/{i}.png", mark=True)
            write_mask(root / f"AeBAD_S/ground_truth/groove/{domain}/{i}.png")
        for video in ("video1", "video2"):
            write_image(root / f"AeBAD_V/test/{video}/good/{i}.jpg")
            write_image(root / f"AeBAD_V/test/{video}/anomaly/{i}.jpg", mark=True)
    return root


@pytest.fixture(scope="module")
def visa(tmp_path_factory):
    root = tmp_path_factory.mktemp("visa")
    lines = ["object,split,label,image,mask"]
    for i in range(6):
        split, image = "train" if i < 4 else "test", f"pcb1/Data/Images/Normal/{i:04d}.JPG"
        write_image(root / image)
        lines.append(f"pcb1,{split},normal,{image},")
    for i in range(2):
        image, mask = (f"pcb1/Data/{kind}/Anomaly/{i:03d}" for kind in ("Images", "Masks"))
        write_image(root / f"{image}.JPG", mark=True)
        write_mask(root / f"{mask}.png", value=1)
        lines.append(f"pcb1,test,anomaly,{image}.JPG,{mask}.png")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def btad(tmp_path_factory):
    root = tmp_path_factory.mktemp("btad")
    for i in range(4):
        write_image(root / f"02/train/ok/{i}.png")
    for i in range(2):
        write_image(root / f"02/test/ok/{i}.png")
        write_image(root / f"02/test/ko/{i}.bmp", mark=True)
        write_mask(root / f"02/ground_truth/ko/{i}.png")
    return root


@pytest.fixture(scope="module")
def kolektor_sdd2(tmp_path_factory):
    root = tmp_path_factory.mktemp("kolektor_sdd2")
    for split, count in (("train", 6), ("test", 4)):
        for i in range(count):
            write_image(root / f"{split}/{i}.png", mark=i < 2)
            write_mask(root / f"{split}/{i}_GT.png", value=255 * (i < 2))
    return root


@pytest.fixture(scope="module")
def rsdds(tmp_path_factory):
    root = tmp_path_factory.mktemp("rsdds")
    folder = root / "RSDDs dataset/Type-I RSDDs dataset"
    for i in range(1, 5):
        strip = RNG.normal(120, 10, (120, 40)).astype(np.uint8)
        mask = np.zeros_like(strip)
        mask[8:16, 8:24] = 255
        for name, pixels in (("Rail surface images", strip | mask), ("GroundTruth", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name / f"rail_{i}.jpg"), pixels)
    return root


@pytest.fixture
def run(tiny_fields, tmp_path):
    def run(config, raw_dir, *extra):
        fields = tiny_fields(raw_dir, tmp_path / "records")
        args = [f"--config={config}", f"--workdir={tmp_path / 'run'}", *fields]
        assert main.main([*args, "--config.method.names=patchcore", *extra]) == 0
        return json.loads((tmp_path / "run" / "results.json").read_text())["methods"]["patchcore"]

    return run


def test_mvtec_runs_all_categories_in_turn_and_gives_their_mean(run, mvtec):
    result = run("configs/mvtec.py", mvtec)
    assert set(result["metrics"]) == {"mvtec_ad/screw", "mvtec_ad/tile"}
    each = [m["all"]["image_auroc"]["mean"] for m in result["metrics"].values()]
    assert result["summary"]["image_auroc"]["mean"] == pytest.approx(np.mean(each))


def test_mvtec_runs_one_category(run, mvtec):
    assert set(run("configs/mvtec.py:screw", mvtec)["metrics"]) == {"mvtec_ad/screw"}


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


def test_one_model_for_all_categories_is_reported_by_category(run, mvtec):
    result = run("configs/mvtec.py", mvtec, "--config.data.protocol=one_for_all")
    assert set(result["metrics"]) == {"mvtec_ad/all"}
    domains = result["metrics"]["mvtec_ad/all"]
    assert set(domains) == {"all", "screw", "tile"}
    each = [domains[category]["image_auroc"]["mean"] for category in ("screw", "tile")]
    assert result["summary"]["image_auroc"]["mean"] == pytest.approx(np.mean(each))


def test_k_shot_trains_on_as_many_images_as_it_says(run, mvtec, monkeypatch):
    seen = []
    real = loop.train

    def spy(method, records, *args, **kwargs):
        seen.append(len(records))
        return real(method, records, *args, **kwargs)

    monkeypatch.setattr(loop, "train", spy)
    run("configs/mvtec.py:screw", mvtec, "--config.data.protocol=k_shot", "--config.data.shots=2")
    assert seen == [2]


def test_unknown_category_lists_the_known(mvtec, tmp_path, capsys):
    args = ["--config=configs/mvtec.py:skrew", f"--workdir={tmp_path}"]
    fields = [f"--config.data.raw_dir={mvtec}", f"--config.data.data_dir={tmp_path}"]
    assert main.main([*args, *fields]) == 1
    assert "screw" in capsys.readouterr().err
