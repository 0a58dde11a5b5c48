"""The contact sheet shows every kind that was asked for, outlined, above real defects."""

import cv2
import numpy as np
import pytest

from mmrjax.data.defects import __main__ as preview

SIZE, COLUMNS = 64, 3


@pytest.fixture
def folders(tmp_path):
    """Good pictures, and others with a dark rectangle and its mask."""
    rng = np.random.default_rng(0)
    for name in ("good/0.png", "good/1.png", "bad/0.jpg", "bad/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image, mask = rng.integers(140, 160, (80, 80, 3), np.uint8), np.zeros((80, 80), np.uint8)
        if name.startswith("bad"):
            image[30:42, 20:50], mask[30:42, 20:50] = 20, 255
            cv2.imwrite(str((tmp_path / name).with_suffix(".png")), mask)
        cv2.imwrite(str(tmp_path / name), image)
    return tmp_path


def test_a_sheet_has_a_row_for_each_kind_its_outlines_and_the_real_ones(folders):
    sheet = folders / "sheet.png"
    given = [f"--good={folders / 'good'}", f"--real={folders / 'bad'}", f"--bank={folders / 'bad'}"]
    sizes = [f"--size={SIZE}", f"--columns={COLUMNS}", f"--output={sheet}"]
    assert preview.main(["--preview", *given, *sizes, "--kinds=spot,real"]) == 0
    image, step = cv2.imread(str(sheet), cv2.IMREAD_COLOR_RGB), SIZE + preview.GAP
    assert image.shape == (
        7 * step,
        preview.LABEL + COLUMNS * step,
        3,
    )  # 2 x 2 rows, 3 of real ones
    rows = [image[i * step :][:SIZE, preview.LABEL :] for i in range(7)]
    is_red = [((row == (255, 0, 0)).all(-1)).any() for row in rows]
    assert is_red == [False, True, False, True, False, False, False]
    cells = [[row[:, i * step :][:, :SIZE] for i in range(COLUMNS)] for row in rows]
    for cell in cells[0]:  # a spot is small, a real defect is not
        assert 0 < (np.abs(cell.mean(-1) - 150) > 15).sum() < 3 * 81
    for cell in cells[2]:
        assert (cell.mean(-1) < 90).sum() > 100
    for row in cells[4:]:
        assert all((cell.mean(-1) < 60).sum() > 150 for cell in row[:2])
        assert not row[2].any()  # there are two real ones


def test_a_sheet_of_foreign_textures_has_outlines_below_each_row(folders):
    sheet = folders / "sheet.png"
    given = [f"--good={folders / 'good'}", "--recipe=perlin", "--foreground"]
    sizes = [f"--size={SIZE}", f"--columns={COLUMNS}", f"--output={sheet}"]
    assert preview.main(["--preview", *given, *sizes, f"--textures={folders / 'bad'}"]) == 0
    image, step = cv2.imread(str(sheet), cv2.IMREAD_COLOR_RGB), SIZE + preview.GAP
    assert image.shape == (8 * step, preview.LABEL + COLUMNS * step, 3)
    for i in range(0, 8, 2):
        plain, outlined = (image[j * step :][:SIZE, preview.LABEL :] for j in (i, i + 1))
        assert not (plain == (255, 0, 0)).all(-1).any()
        assert (outlined == (255, 0, 0)).all(-1).any()


@pytest.mark.parametrize(("change", "message"), [
    ("--textures=nowhere --recipe=perlin", "no picture in this folder can be read"),
    ("--good=nowhere", "no pictures in 'nowhere'"),
    ("--kinds=spot,dent", "unknown kinds of defects ['dent']"),
    ("--bank=nowhere", "no pairs of picture and mask in nowhere"),
])  # fmt: skip
def test_what_is_missing_is_one_line(folders, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        preview.main(["--preview", f"--good={folders / 'good'}", f"--size={SIZE}", *change.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
