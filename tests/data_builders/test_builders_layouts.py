"""The layouts of published data sets, and words of seven languages, as a user's own folder."""

import pathlib
import unicodedata

import cv2
import numpy as np
import pytest

from data_builders.folder import layout, words


def write(root: pathlib.Path, name: str, seed: int) -> None:
    """A noisy picture, a mask (masks/…, _mask), or an empty mask (name with EMPTY)."""
    path = root / name.replace("EMPTY ", "").replace("MASK ", "")
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    if name.startswith(("MASK ", "EMPTY ")):
        pixels = np.zeros((24, 32), np.uint8)
        pixels[4:9, 6:14] = 255 * name.startswith("MASK ")
    assert cv2.imwrite(str(path), pixels)


def summary(found: layout.Layout, root: pathlib.Path) -> dict[str, list[str]]:
    """{"train", "good", "bad", "masked": names}; "train" are good ones."""
    out = {"train": [], "good": [], "bad": [], "masked": []}
    for item in found.items:
        name = item.path.relative_to(root).as_posix()
        kind = "bad" if item.defect != "good" else "train" if item.split == "train" else "good"
        out[kind].append(name)
        if item.masks:
            out["masked"].append(name)
    return out


# Files of a layout (MASK and EMPTY before a mask), then what is trained on, good, bad and masked.
LAYOUTS = {
    "MVTec AD": (
        ["train/good/0.png", "test/good/1.png", "test/bent/2.png",
         "MASK ground_truth/bent/2_mask.png"],
        (["train/good/0.png"], ["test/good/1.png"], ["test/bent/2.png"], ["test/bent/2.png"]),
    ),
    "MVTec AD 2": (
        ["train/good/0_regular.png", "validation/good/1_regular.png",
         "test_public/good/2_regular.png", "test_public/bad/3_regular.png",
         "MASK test_public/ground_truth/bad/3_regular_mask.png", "test_private/4_regular.png",
         "test_private_mixed/5_mixed.png"],
        (["train/good/0_regular.png", "validation/good/1_regular.png"],
         ["test_public/good/2_regular.png"], ["test_public/bad/3_regular.png"],
         ["test_public/bad/3_regular.png"]),
    ),
    "MVTec LOCO": (
        ["train/good/0.png", "validation/good/1.png", "test/good/2.png",
         "test/logical_anomalies/000.png", "test/structural_anomalies/000.png",
         "MASK ground_truth/logical_anomalies/000/000.png",
         "MASK ground_truth/logical_anomalies/000/001.png",
         "MASK ground_truth/structural_anomalies/000/000.png"],
        (["train/good/0.png", "validation/good/1.png"], ["test/good/2.png"],
         ["test/logical_anomalies/000.png", "test/structural_anomalies/000.png"],
         ["test/logical_anomalies/000.png", "test/structural_anomalies/000.png"]),
    ),
    "VisA": (
        ["Data/Images/Normal/0000.jpg", "Data/Images/Anomaly/000.jpg",
         "MASK Data/Masks/Anomaly/000.png", "image_anno.csv.png"],
        (["Data/Images/Normal/0000.jpg"], [], ["Data/Images/Anomaly/000.jpg"],
         ["Data/Images/Anomaly/000.jpg"]),
    ),
    "BTAD": (
        ["train/ok/0.bmp", "test/ok/1.bmp", "test/ko/2.bmp", "MASK ground_truth/ko/2.png"],
        (["train/ok/0.bmp"], ["test/ok/1.bmp"], ["test/ko/2.bmp"], ["test/ko/2.bmp"]),
    ),
    "KolektorSDD 1": (
        [f"kos0{k}/Part{p}.jpg" for k in (1, 2, 3, 4) for p in (0, 1)]
        + [f"{'MASK' if (k, p) == (2, 1) else 'EMPTY'} kos0{k}/Part{p}_label.bmp"
           for k in (1, 2, 3, 4) for p in (0, 1)],
        (None, None, ["kos02/Part1.jpg"], ["kos02/Part1.jpg"]),
    ),
    "KolektorSDD 2": (
        ["train/1.png", "EMPTY train/1_GT.png", "test/2.png", "EMPTY test/2_GT.png", "test/3.png",
         "MASK test/3_GT.png", "train/4.png", "MASK train/4_GT.png"],
        (["train/1.png"], ["test/2.png"], ["test/3.png", "train/4.png"],
         ["test/3.png", "train/4.png"]),
    ),
    "Real-IAD": (
        ["OK/S0001/a_0001_OK_C1.jpg", "OK/S0002/a_0002_OK_C1.jpg", "NG/BX/S0005/a_0005_NG_C1.jpg",
         "MASK NG/BX/S0005/a_0005_NG_C1.png"],
        (None, None, ["NG/BX/S0005/a_0005_NG_C1.jpg"], ["NG/BX/S0005/a_0005_NG_C1.jpg"]),
    ),
    "MPDD": (
        ["train/good/0.png", "test/good/1.png", "test/hole/0.png",
         "MASK ground_truth/hole/0_mask.png"],
        (["train/good/0.png"], ["test/good/1.png"], ["test/hole/0.png"], ["test/hole/0.png"]),
    ),
    "castings": (
        ["train/ok_front/0.jpg", "train/def_front/1.jpg", "test/ok_front/2.jpg",
         "test/def_front/3.jpg"],
        (["train/ok_front/0.jpg"], ["test/ok_front/2.jpg"],
         ["test/def_front/3.jpg", "train/def_front/1.jpg"], []),
    ),
    "normal_test": (
        ["normal_train/0.png", "normal_test/1.png", "anomaly_test/2.png"],
        (["normal_train/0.png"], ["normal_test/1.png"], ["anomaly_test/2.png"], []),
    ),
    "labels beside": (
        ["good/0.png", "good/1.png", "bad/2.png", "MASK labels/bad/2.png", "MASK gt/bad/9.png"],
        (None, None, ["bad/2.png"], ["bad/2.png"]),
    ),
    "flat": ([f"{i}.png" for i in range(5)], (None, None, [], [])),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_published_data_sets(tmp_path, name):
    files, expected = LAYOUTS[name]
    for seed, file in enumerate(files):
        write(tmp_path, file, seed)
    found = summary(layout.read_layout(tmp_path), tmp_path)
    masks = {file for file in files if file.startswith(("MASK", "EMPTY"))}
    taken = {*found["train"], *found["good"], *found["bad"]}
    assert not {m.split(" ", 1)[1] for m in masks} & taken
    for kind, names in zip(("train", "good", "bad", "masked"), expected, strict=True):
        if names is not None:
            assert sorted(found[kind]) == sorted(names), kind


def test_the_table_names_what_is_left_out_and_what_pairs_with_nothing(tmp_path):
    for seed, file in enumerate(LAYOUTS["MVTec AD 2"][0]):
        write(tmp_path, file, seed)
    write(tmp_path, "MASK test_public/ground_truth/bad/77_mask.png", 0)
    write(tmp_path, "test_public/bad/8_regular.png", 8)
    (tmp_path / "test_public/bad/9.heic").write_bytes(b"?")
    text = "\n".join(layout.read_layout(tmp_path).table)
    for part in (
        "2 good to train on; to test 1 good and 2 defective (bad 2), 1 of them with a mask",
        "good, trained on               2  from train/good, validation/good",
        "masks without a picture        1  test_public/ground_truth/bad/77_mask.png",
        "defective without a mask       1  test_public/bad/8_regular.png",
        "test_private/4_regular.png: nothing says its label",
        "9.heic: .heic is not read",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("good", "bad", "masks"),
    [
        ("Gut", "Ausschuß", "Masken"),
        ("i.O.", "n.i.O.", "Maske"),
        ("良品", "不良品", "掩码"),
        ("正常", "异常", "标注"),
        ("無欠陥良品", "欠陥", "マスク"),
        ("정상", "불량", "마스크"),
        ("Buenas", "Defectuosas", "máscaras"),
        ("Sans défaut", "DÉFAUTS", "Masques"),
        ("defect-free", "Defective", "GroundTruth"),
        ("OK_parts", "NG_parts", "label_images"),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_words_of_seven_languages(tmp_path, form, good, bad, masks):
    good, bad, masks = (unicodedata.normalize(form, text) for text in (good, bad, masks))
    other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", bad).upper()
    for i in range(3):
        write(tmp_path, f"{good}/{i}.png", i)
    write(tmp_path, f"{bad}/7.png", 7)
    write(tmp_path, f"MASK {masks}/{other}/7.PNG", 7)
    found = layout.read_layout(tmp_path)
    assert [item.path.parent.name for item in found.items if item.masks] == [bad]
    assert sum(item.defect == "good" for item in found.items) == 3
    assert len(found.items) == 4


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("torn_label", set()), ("label_torn", set()), ("cut", set()), ("abnormal", {"bad"}),
        ("good_and_bad", set()), ("비정상", {"bad"}), ("不合格", {"bad"}), ("無缺陷", {"good"}),
        ("train_masks", {"train", "mask"}), ("not good", {"bad"}), ("ng1", {"bad"}),
    ],
)  # fmt: skip
def test_words_inside_names(name, kinds):
    assert words.meaning(name)[0] == kinds


def test_patterns_of_the_user_come_before_words(tmp_path):
    for seed, name in enumerate(("a/x/1.png", "a/y/2.png", "b/3.png", "good/4.png", "m/3.png")):
        write(tmp_path, ("MASK " if name[0] == "m" else "") + name, seed)
    choice = layout.Choice(good=("A/**",), bad=("b/*",), masks=("m/*",))
    found = layout.read_layout(tmp_path, choice)
    assert {i.path.name: i.defect for i in found.items} == {
        "1.png": "good", "2.png": "good", "3.png": "b",
    }  # fmt: skip
    assert ("a picture that is left out", "good/4.png: no pattern names it") in found.findings
    with pytest.raises(ValueError, match=r"data\.good and data\.bad both name it"):
        layout.read_layout(tmp_path, layout.Choice(good=("a/**",), bad=("a/x/*",)))


def test_categories_of_other_layouts_are_told_apart(tmp_path, built):
    for category in ("螺丝", "垫片"):
        for i in range(2):
            write(tmp_path / "set", f"{category}/Data/Images/Normal/{i}.png", i)
        write(tmp_path / "set", f"{category}/Data/Images/Anomaly/0.png", 7)
    assert sorted(built("folder", tmp_path / "set", tmp_path / "records")) == ["垫片", "螺丝"]
