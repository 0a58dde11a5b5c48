"""Textures of a folder and drawn ones."""

import cv2
import numpy as np
import pytest

from mmrjax.data.defects import textures


def test_drawn_textures_are_the_same_for_a_seed_and_all_different():
    first = textures.draw(12, (32, 48))
    assert first.shape == (12, 32, 48, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, textures.draw(12, (32, 48)))
    assert len({x.tobytes() for x in first}) == 12
    assert (first.std(axis=(1, 2, 3)) > 1).all()
    assert not np.array_equal(first, textures.draw(12, (32, 48), seed=1))


def test_pictures_of_a_folder_are_squashed_to_the_size(tmp_path, monkeypatch):
    (tmp_path / "banded").mkdir()
    for i in range(5):
        image = np.full((20, 30, 3), 10 * i, np.uint8)
        cv2.imwrite(str(tmp_path / "banded" / f"{i}.png"), image)
    (tmp_path / "notes.txt").write_text("no picture")
    bank, facts = textures.make(str(tmp_path), (16, 24))
    assert bank.shape == (5, 16, 24, 3)
    assert sorted(bank[:, 0, 0, 0]) == [0, 10, 20, 30, 40]
    assert facts["textures"] == {"source": tmp_path.name, "count": 5, "found": 5}
    monkeypatch.setattr(textures, "MOST", 3)
    bank, facts = textures.make(str(tmp_path), (16, 24))
    assert len(bank) == 3
    assert facts["textures"]["found"] == 5


def test_a_folder_without_pictures_is_refused_in_one_line(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"data.textures=.*no picture in this folder can be read"):
        textures.make(str(tmp_path), (16, 16))


def test_drawn_ones_are_named_in_the_facts():
    bank, facts = textures.make("", (16, 16))
    assert len(bank) == textures.DRAWN
    assert facts["textures"]["source"] == "procedural"
