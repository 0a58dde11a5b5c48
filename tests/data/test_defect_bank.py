"""Any folder of pictures and masks becomes defects that can be cut and blended."""

import cv2
import jax
import numpy as np
import pytest

from mmrjax.data import defect_bank, defects


def write(folder, layout: str, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    picture, truth = {
        "twin": (f"{name}.jpg", f"{name}.png"),
        "marked": (f"{name}.png", f"{name}_mask.png"),
        "apart": (f"images/{name}.png", f"masks/{name}.png"),
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


@pytest.mark.parametrize("layout", ["twin", "marked", "apart"])
def test_pairs_are_found_in_any_layout(tmp_path, pair, layout):
    for name in ("a", "b"):
        write(tmp_path, layout, name, *pair)
    assert len(defect_bank.find_pairs(tmp_path)) == 2
    image, mask = next(defect_bank.load_pairs(tmp_path, (50, 60)))
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
    assert np.asarray(found.images.min((1, 2, 3)))[whole] == pytest.approx(120, abs=3)


def test_what_is_missing_or_wrong_is_said(tmp_path, pair):
    with pytest.raises(ValueError, match="no pairs"):
        defect_bank.find_pairs(tmp_path)
    write(tmp_path, "marked", "a", pair[0], pair[1][:50])
    with pytest.raises(ValueError, match="a_mask"):
        list(defect_bank.load_pairs(tmp_path, (50, 60)))
    with pytest.raises(ValueError, match="no defect"):
        defect_bank.make_bank([pair], side=16)
