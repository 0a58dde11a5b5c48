"""Checks, defaults and counts of the base class, shown with a data set that a program draws."""

import os
import pathlib

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_builders import build, common, files

PIXELS = np.full((8, 10, 3), 90, np.uint8)


class Toy(common.RecordBuilder, skip_registration=True):
    """Yields what a test puts into `planned`."""

    VERSION = tfds.core.Version("1.0.0")
    CATEGORIES = ("a", "b")
    PROCEDURAL = True
    pkg_dir_path = pathlib.Path(__file__).parent
    planned = ()

    def examples(self, raw_dir, category):
        assert raw_dir is None
        yield from self.planned


def good(name="g", **features):
    return {"id": name, "image": PIXELS, "label": "good", **features}


def bad(name="b", **features):
    return {"id": name, "image": PIXELS, "label": "anomaly", **features}


@pytest.fixture
def toy(monkeypatch, tmp_path, built):
    """Builds the toy data set from the examples given, all but the first for testing."""
    monkeypatch.setattr(build, "load_builder", lambda name: Toy)

    def run(*examples, **kwargs):
        splits = ["train"] + ["test"] * (len(examples) - 1)
        monkeypatch.setattr(Toy, "planned", tuple(zip(splits, examples, strict=True)))
        return built("toy", None, tmp_path, categories=["a"], **kwargs)["a"]

    return run


def test_defaults_are_filled_in(toy):
    record = toy(good())["train"]["g"]
    expected = {"category": "a", "dataset": "toy", "defect": "good", "domain": "", "group": "g"}
    expected |= {"frame": -1, "source": 0, "twin": "", "has_mask": True}
    assert {key: record[key] for key in expected} == expected
    assert not record["mask"].any()


def test_given_features_are_kept(toy):
    mask = np.zeros((8, 10), bool)
    mask[2:4, 5] = True
    features = {"mask": mask, "defect": "crack", "domain": "view", "group": "7", "frame": 3}
    record = toy(good(), bad(**features, source="synthetic", twin="g"))["test"]["b"]
    np.testing.assert_array_equal(record["mask"][..., 0], mask * 255)
    kept = {key: record[key] for key in ("defect", "domain", "group", "frame", "source", "twin")}
    assert kept == {
        "defect": "crack", "domain": "view", "group": "7", "frame": 3, "source": 1, "twin": "g"
    }  # fmt: skip


@pytest.mark.parametrize("mask", [None, np.zeros((8, 10), np.uint8), pathlib.Path("/none.png")])
def test_defective_image_without_marked_pixels_has_no_pixel_truth(toy, mask):
    assert not toy(good(), bad(mask=mask))["test"]["b"]["has_mask"]


def test_functions_are_called_when_their_record_is_written(toy):
    calls = []

    def draw(name):
        calls.append(name)
        return good(name)

    records = toy(lambda: draw("x"), lambda: draw("y"))
    assert calls == ["x", "y"]
    assert set(records["train"]) | set(records["test"]) == {"x", "y"}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (good("g"), "g: two records have this id"),
        ({"id": "x", "image": PIXELS}, r"x: the example lacks \['label'\]"),
        (good("x", colour=1), r"x: unknown \['colour'\]"),
        (good("x", label="fine"), "x: label 'fine' is none of"),
        (good("x", defect="crack"), "x: defect 'crack' contradicts label 'good'"),
        (good("x", mask=np.ones((8, 10))), "x: a good image, but its mask marks 80 pixels"),
        (bad("x", mask=np.ones((8, 9))), "x: the mask is 9x8, its image 10x8"),
        (bad("x", twin="nobody"), "x: its twin 'nobody' is no record of toy"),
        (good("x", image=b"GIF"), "x: the image is damaged"),
        (good("x", image=PIXELS[..., 0]), "x: expected RGB pixels"),
    ],
)
def test_wrong_examples_are_refused_with_their_id(toy, tmp_path, example, message):
    with pytest.raises(ValueError, match=message):
        toy(good(), example)
    assert not list(tmp_path.rglob("*.array_record*")), "a refused data set leaves no records"


def test_records_of_a_program_are_rebuilt_when_its_version_changes(toy, monkeypatch):
    log = []
    toy(good(), log=log)
    toy(good(), log=log)
    assert "up to date" in log[-1]
    monkeypatch.setattr(Toy, "fingerprint", classmethod(lambda cls, root, category: "toy 2"))
    toy(good("h"), log=log)
    assert any("the generator changed" in line for line in log)


def test_progress_reaches_the_number_of_images(tmp_path):
    seen = []
    builder = Toy(data_dir=tmp_path, config=Toy.config("a"))
    builder.planned = [("train", good("x")), ("test", bad("y")), ("test", good("z"))]
    builder.on_record = lambda done, total: seen.append((done, total))
    builder.download_and_prepare(file_format="array_record")
    assert sorted(seen) == [(1, 3), (2, 3), (3, 3)]


def test_list_images_ignores_what_systems_leave_and_survives_link_loops(
    tmp_path, write_image, clutter
):
    clutter(tmp_path / "a b")
    for name in ("a b/2.PNG", "a b/10.jpg", "c/1.webp"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "c/loop").symlink_to(tmp_path)
    found = [p.relative_to(tmp_path).as_posix() for p in files.list_images(tmp_path)]
    assert found == ["a b/10.jpg", "a b/2.PNG", "c/1.webp"]


def test_fingerprint_follows_names_and_sizes_of_images_only(tmp_path, write_image, clutter):
    image = write_image(tmp_path / "a/1.png")
    before = files.folder_fingerprint(tmp_path)
    clutter(tmp_path / "a")
    (tmp_path / "readme.txt").write_text("no image")
    assert files.folder_fingerprint(tmp_path) == before
    image.rename(tmp_path / "a/2.png")
    renamed = files.folder_fingerprint(tmp_path)
    assert renamed != before
    write_image(tmp_path / "a/2.png", size_hw=(30, 30))
    assert files.folder_fingerprint(tmp_path) not in (before, renamed)


def test_fingerprint_does_not_depend_on_where_the_folder_lies(tmp_path, write_image):
    write_image(tmp_path / "x/a/1.png")
    before = files.folder_fingerprint(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "y")
    assert files.folder_fingerprint(tmp_path / "y") == before


def test_masks_are_read_by_the_usual_rule_above_127(toy, tmp_path):
    path = tmp_path / "m.png"
    cv2.imwrite(
        str(path), np.repeat([[0, 60, 127, 128, 200]], 8, axis=0).astype(np.uint8).repeat(2, 1)
    )
    mask = toy(good(), bad(mask=path))["test"]["b"]["mask"][0, :, 0]
    assert mask[::2].tolist() == [0, 0, 0, 255, 255]


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/nowhere.png"), os.mkfifo])
def test_a_link_to_nothing_or_a_pipe_is_named_and_never_read(tmp_path, make):
    make(tmp_path / "odd.png")
    assert files.list_images(tmp_path) == []
    [line] = files.list_others(tmp_path)
    assert line in ("odd.png: a link to nothing", "odd.png: no ordinary file")


def test_formats_that_are_not_read_are_named(tmp_path):
    for name in ("a.gif", "b.HEIC", "notes.txt", ".hidden.gif"):
        (tmp_path / name).write_bytes(b"?")
    assert [line.split(":")[0] for line in files.list_others(tmp_path)] == ["a.gif", "b.HEIC"]


@pytest.mark.parametrize("marks", files.OWN_OUTPUTS)
def test_what_this_project_wrote_is_no_data(tmp_path, marks):
    for name in marks:
        (tmp_path / "out/deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    (tmp_path / "out/deep/a.png").write_bytes(b"?")
    (tmp_path / "b.png").write_bytes(b"?")
    assert files.list_images(tmp_path) == [tmp_path / "b.png"]


@pytest.mark.parametrize("raw", [b"\xff.png", b"a\rb.png", b"a\nb.png", b"\x1b[31m.png"])
def test_a_name_that_is_no_text_is_written_as_escapes(toy, raw):
    (record,) = toy(good(os.fsdecode(raw)))["train"].values()
    assert record["id"].isprintable()
    assert record["id"].endswith(".png")


def test_a_file_in_place_of_the_records_folder_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"data_dir=.*notes\.txt is a file; name another folder"):
        build.build("demo_parts", None, tmp_path / "notes.txt" / "records")
