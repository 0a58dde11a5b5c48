"""Any folder of pictures and masks becomes defects that can be cut and blended."""

import dataclasses

import cv2
import jax
import numpy as np
import pytest

from mmrjax.data import geometry
from mmrjax.data.defects import bank as defect_bank
from mmrjax.data.defects import synthesise as defects
from mmrjax.data.records import Records

SMALL = geometry.View((50, 60), (50, 60))


def write(folder, layout: str, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    picture, truth = {
        "twin": (f"{name}.jpg", f"{name}.png"),
        "marked": (f"{name}.png", f"{name}_mask.png"),
        "apart": (f"images/{name}.png", f"masks/{name}.png"),
        "mvtec": (f"test/dent/{name}.png", f"ground_truth/dent/{name}_mask.png"),
    }[layout]
    for path, array in ((picture, image), (truth, mask.astype(np.uint8) * 255)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / path), array)


@pytest.fixture
def pair():
    image, mask = np.full((100, 120, 3), 120, np.uint8), np.zeros((100, 120), bool)
    mask[40:52, 60:80] = True
    image[mask] = 40
    return image, mask


@pytest.mark.parametrize("layout", ["twin", "marked", "apart", "mvtec"])
def test_pairs_are_found_in_any_layout(tmp_path, pair, layout):
    for name in ("a", "b"):
        write(tmp_path, layout, name, *pair)
    assert len(defect_bank.find_pairs(tmp_path)) == 2
    image, mask = next(defect_bank.load_pairs(tmp_path, SMALL))
    assert image.shape == (50, 60, 3)
    assert mask.sum() == pair[1].sum() / 4
    assert image[mask].mean() < 60


def test_each_component_is_cut_once_and_large_ones_are_counted(pair):
    image, mask = pair
    mask[0:5, 0:5] = True
    large = np.ones((100, 120), bool)
    bank, too_large = defect_bank.make_bank([(image, mask), (image, large)], side=48)
    assert bank.images.shape == (2, 48, 48, 3)
    assert sorted(bank.masks.sum((1, 2)).tolist()) == [25, 240]
    assert too_large == 1


def test_real_defects_are_blended_into_pictures(pair):
    bank, _ = defect_bank.make_bank([pair], side=48)
    images = np.full((6, 64, 64, 3), 200, np.uint8)
    settings = defects.DefectSettings(kinds=("real",))
    found = jax.jit(defects.synthesise, static_argnames="settings")(
        jax.random.key(0), images, None, settings=settings, bank=bank
    )
    assert (np.asarray(found.kind) == defects.KINDS.index("real")).all()
    # The defect keeps its depth of 80 grey levels, not its own level of 40.
    whole = np.asarray(found.mask.sum((1, 2))) >= 240
    assert whole.any()
    assert np.asarray(found.pixels.min((1, 2, 3)))[whole] == pytest.approx(120, abs=3)


def test_what_is_missing_or_wrong_is_said(tmp_path, pair):
    with pytest.raises(ValueError, match="no pairs"):
        defect_bank.find_pairs(tmp_path)
    write(tmp_path, "marked", "a", pair[0], pair[1][:50])
    with pytest.raises(ValueError, match="a_mask"):
        list(defect_bank.load_pairs(tmp_path, SMALL))
    with pytest.raises(ValueError, match=r"no defect of at most 4 px.*1 are larger, 0 masks"):
        defect_bank.make_bank([pair], side=16)
    with pytest.raises(ValueError, match=r"0 are larger, 1 masks are empty"):
        defect_bank.make_bank([(pair[0], np.zeros_like(pair[1]))])


def test_a_mask_of_zeros_and_ones_is_refused_by_name(tmp_path, pair):
    write(tmp_path, "marked", "a", *pair)
    cv2.imwrite(str(tmp_path / "a_mask.png"), pair[1].astype(np.uint8))
    with pytest.raises(ValueError, match=r"a_mask\.png has no value above 1; expected 0 and"):
        list(defect_bank.load_pairs(tmp_path, SMALL))


def test_a_mask_is_not_taken_for_a_picture_whose_mask_another_one_is(tmp_path, pair):
    for name in (
        "images/a.png",
        "masks/a.PNG",
        "gt/a.png",
        "b.png",
        "b_mask.png",
        "b_mask_mask.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), pair[0])
    found = [
        tuple(str(p.relative_to(tmp_path)) for p in x) for x in defect_bank.find_pairs(tmp_path)
    ]
    assert found == [("b.png", "b_mask.png"), ("images/a.png", "masks/a.PNG")]


# --- labelled defects of records


class Pictures:
    """Grey pictures, each with a defect of its own width, as a source of records."""

    def __init__(self, masks):
        self.masks = masks

    def __getitem__(self, i):
        mask = np.zeros((80, 80), np.uint8)
        mask[10:18, 12 : 20 + i] = 255
        pictures = {
            "image": np.full((80, 80, 3), 10 * i, np.uint8),
            "mask": self.masks.get(i, mask),
        }
        return {name: cv2.imencode(".png", array)[1].tobytes() for name, array in pictures.items()}


def labelled_records(rows=range(12), masks=None) -> Records:
    """Two parts: in one 6 dents and 2 cracks, in the other 3 dents and a defect without mask."""
    part = np.array(["x/a"] * 8 + ["y/b"] * 4)
    defect = np.array(["dent"] * 6 + ["crack"] * 2 + ["dent"] * 4)
    domain = np.array([f"exp{i}" for i in range(12)])
    table = {"part": part, "defect": defect, "has_mask": np.arange(12) != 11, "id": domain}
    sources = {"": Pictures(masks or {})}
    places = [("", i) for i in range(12)]
    return Records("x+y", "all", {**table, "domain": domain}, "", sources, places).take(rows)


VIEW = geometry.View((80, 80), (80, 80))


def test_labelled_defects_are_cut_from_the_rows_given_with_part_and_type():
    found = defect_bank.from_records(labelled_records([0, 1, 6, 9, 11]), VIEW)
    assert found.part.tolist() == ["x/a", "x/a", "x/a", "y/b"]  # the last has no mask
    assert found.defect.tolist() == ["dent", "dent", "crack", "dent"]
    assert found.counts() == {"x/a": {"dent": 2, "crack": 1}, "y/b": {"dent": 1}}
    assert found.bank.images.shape == (4, 128, 128, 3)
    for i, own in zip((0, 1, 6, 9), range(4), strict=True):
        assert found.bank.masks[own].sum() == 8 * (8 + i)
        assert (found.bank.images[own][found.bank.masks[own]] == 10 * i).all()
    assert defect_bank.from_records(labelled_records([11]), VIEW) is None


def test_whole_pictures_are_kept_with_what_is_too_large_to_cut_and_where_a_defect_is_seen():
    masks = {1: np.zeros((80, 80), np.uint8), 6: np.full((80, 80), 255, np.uint8)}
    records = labelled_records([0, 1, 6, 9, 11], masks)
    found = defect_bank.from_records(records, VIEW, whole_pictures=True)
    assert found.domain.tolist() == ["exp0", "exp6", "exp9"]
    assert found.part.tolist() == ["x/a", "x/a", "y/b"]
    assert found.defect.tolist() == ["dent", "crack", "dent"]
    assert found.bank.images.shape == (3, 80, 80, 3)
    assert found.bank.images[:, 0, 0, 0].tolist() == [0, 60, 90]
    assert found.bank.masks.sum((1, 2)).tolist() == [64, 6400, 8 * 17]
    chances = found.chances(["x/a", "x/a", "y/b"], ["exp0", "exp6", "exp0"])
    assert (chances > 0).tolist() == [[True, False, False], [False, True, False], [False] * 3]
    assert found.left_out == 1  # without one in view; record 11 has no mask
    assert defect_bank.from_records(records.take([1, 4]), VIEW, whole_pictures=True) is None
    some = found.select(np.array([True, False, True]))
    assert (some.part.tolist(), some.domain.tolist()) == (["x/a", "y/b"], ["exp0", "exp9"])
    assert (len(some.bank.images), some.left_out) == (2, 2)


def test_types_are_alike_within_a_domain_too():
    found = defect_bank.from_records(labelled_records(range(8)), VIEW, whole_pictures=True)
    domain = np.array(["a", "b", "b", "b", "b", "b", "a", "b"])  # a: a dent, a crack
    chances = dataclasses.replace(found, domain=domain).chances(["x/a"] * 2, ["a", "b"])
    for row, name in zip(chances, "ab", strict=True):
        own = domain == name
        dents, cracks = (row[own & (found.defect == kind)].sum() for kind in ("dent", "crack"))
        assert dents == pytest.approx(cracks) == pytest.approx(1)
        assert not row[~own].any()


@pytest.mark.parametrize("whole", [True, False])
def test_a_label_of_a_pixel_vanishes_in_a_small_view_unless_pictures_are_whole(whole):
    image, masks = np.zeros((480, 640, 3), np.uint8), []
    for y, x in ((100, 100), (101, 103), (479, 639), (0, 0)):
        mask = np.zeros((480, 640), np.uint8)
        mask[y, x] = 255
        masks.append(defect_bank._seen(image, mask, geometry.View((80, 80), (80, 80)), whole)[1])
    assert all(mask.any() for mask in masks) == whole
    assert all(mask.sum() <= 4 for mask in masks)


def test_defects_of_a_folder_go_on_pictures_of_every_part(tmp_path, pair):
    for name in ("a", "b"):
        write(tmp_path / "dents", "marked", name, *pair)
    own = defect_bank.from_folder(tmp_path / "dents", geometry.View((100, 120), (100, 120)))
    assert own.counts() == {"any": {"dents": 2}}
    assert own.bank.images.shape == (2, 128, 128, 3)
    assert own.bank.masks.sum() == 2 * pair[1].sum()
    records = defect_bank.from_records(labelled_records([0, 1, 9]), VIEW)
    both = defect_bank.joined([records, own])
    assert both.part.tolist() == ["x/a", "x/a", "y/b", "any", "any"]
    # Each type alike: half to the two dents of the part, half to the two of the folder.
    chances = both.chances(["x/a", "z/c"])
    np.testing.assert_allclose(chances, [[0.5, 0.5, 0, 0.5, 0.5], [0, 0, 0, 0.5, 0.5]])


def test_types_of_the_same_part_are_alike_whatever_their_numbers():
    found = defect_bank.from_records(labelled_records(range(11)), VIEW)
    chances = found.chances(["y/b", "x/a", "z/c"])
    assert chances.shape == (3, 11)
    for row, part in zip(chances, ("y/b", "x/a", "z/c"), strict=True):
        assert not row[found.part != part].any()
    x = chances[1]
    assert x[found.defect == "dent"].sum() == pytest.approx(x[found.defect == "crack"].sum())
    np.testing.assert_allclose(x[:6], 1 / 6)


def test_each_picture_gets_defects_of_its_own_part_and_none_where_there_are_none():
    """Part 0 has two specimens of one type, part 1 one, part 2 none."""
    masks = np.zeros((3, 48, 48), bool)
    masks[:, 18:30, 18:30] = True
    levels = np.array([20, 60, 100], np.uint8)
    pixels = np.where(masks[..., None], levels[:, None, None, None], 200)
    bank = defects.Bank(pixels.repeat(3, axis=-1).astype(np.uint8), masks)
    chances = np.float32([[0.5, 0.5, 0], [0, 0, 1], [0, 0, 0]])
    part = np.arange(48) % 3
    settings = defects.DefectSettings(kinds=("stain", "real"), real_share=1.0)
    synthesise = jax.jit(defects.synthesise, static_argnames="settings")
    images = np.full((48, 64, 64, 3), 200, np.uint8)
    found = synthesise(jax.random.key(1), images, None, settings, bank, chances[part])
    kind = np.asarray(found.kind)
    real, stain = defects.KINDS.index("real"), defects.KINDS.index("stain")
    assert set(kind[part == 0]) <= {real, defects.NONE}
    assert set(kind[part == 2]) <= {stain, defects.NONE}
    assert (kind[part < 2] == real).sum() > 24
    darkest = np.asarray(found.pixels.min((1, 2, 3)))
    seen = {p: set(np.round(darkest[(part == p) & (kind == real)]).tolist()) for p in (0, 1)}
    assert seen == {0: {20.0, 60.0}, 1: {100.0}}


def test_the_share_of_labelled_defects_is_that_of_the_settings():
    kinds = ("spot", "groove", "stain", "real")
    shares = defects.DefectSettings(kinds=kinds, real_share=0.5).probabilities
    assert shares == pytest.approx({"spot": 0.15, "groove": 0.15, "stain": 0.2, "real": 0.5})
    assert defects.DefectSettings(kinds=("real",), real_share=0.5).probabilities == {"real": 1.0}
    before = defects.DefectSettings(kinds=kinds).probabilities
    assert before == pytest.approx({"spot": 0.3, "groove": 0.3, "stain": 0.2, "real": 0.2})
    drawn = (np.arange(4000) + 0.5) / 4000
    found = defects._draw_kinds(
        drawn, defects.DefectSettings(kinds=kinds, real_share=0.5), np.ones((4000, 2), np.float32)
    )
    counts = np.bincount(np.asarray(found), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.15, 0.15, 0.2, 0.5], atol=1e-3)
    # Where none can come the others do, in their own shares, also if none else was to come.
    for share in (0.5, 1.0):
        settings = defects.DefectSettings(kinds=kinds, real_share=share)
        none = np.zeros((4000, 2), np.float32)
        counts = np.bincount(np.asarray(defects._draw_kinds(drawn, settings, none)), minlength=4)
        np.testing.assert_allclose(counts / 4000, [0.3, 0.3, 0.4, 0], atol=1e-3)
    with pytest.raises(ValueError, match="real_share=2"):
        defects.DefectSettings(real_share=2)
