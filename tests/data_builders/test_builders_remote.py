"""Records in a bucket: built here and sent, copied once, checked, and never half there."""

import json
import pathlib
import re

import pytest

from data_builders import buckets, build


@pytest.fixture
def raw_dir(tmp_path, write_image, write_mask):
    root = tmp_path / "raw"
    for category in ("bottle", "cable"):
        for name in ("train/good/0", "train/good/1", "test/good/0", "test/bent/0"):
            write_image(root / category / f"{name}.png")
        write_mask(root / category / "ground_truth/bent/0_mask.png")
    return root


@pytest.fixture
def run(bucket, request, raw_dir, tmp_path, monkeypatch):
    """Builds the small MVTec AD in a folder of the bucket, on one machine or another."""
    address = f"{bucket[0]}/{re.sub(r'[^a-z]+', '-', request.node.name)}"

    def call(machine="here", raw=raw_dir, categories=("bottle",)):
        monkeypatch.setenv("MMRJAX_CACHE", str(tmp_path / machine))
        log = []
        found = build.build("mvtec_ad", raw, address, categories, log=log.append)
        return found, "\n".join(log)

    call.address = address
    return call


@pytest.fixture
def objects(bucket, run):
    """() -> {name below the records of `bottle`: number of the write}."""
    place = f"{run.address.rpartition('/')[2]}/mvtec_ad/bottle/1.0.0/"

    def listing() -> dict[str, int]:
        return {n.removeprefix(place): v[1] for n, v in bucket[1].items() if n.startswith(place)}

    listing.place = place
    return listing


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_machine_gets_the_same_records_without_raw_data(run):
    built, log = run()
    assert "sending the records to gs://" in log
    copied, log = run("elsewhere", raw=None, categories=None)
    assert "copying the records of gs://" in log
    assert copied.keys() == {"bottle"}
    assert "elsewhere" in copied["bottle"].parts
    assert content(copied["bottle"]) == content(built["bottle"])


def test_what_is_here_and_there_is_neither_copied_nor_sent_again(run, objects):
    run()
    before = objects()
    _, log = run()
    assert "up to date" in log
    assert "copying" not in log
    assert "sending" not in log
    _, log = run("elsewhere")
    assert "copying the records" in log
    assert "building" not in log
    assert objects() == before


def test_changed_raw_data_replaces_them_and_others_follow(run, raw_dir, write_image, objects):
    run()
    run("elsewhere", raw=None)
    before = objects()
    write_image(raw_dir / "bottle/train/good/2.png")
    built, log = run()
    assert "the raw data changed" in log
    assert all(objects()[name] > number for name, number in before.items())
    copied, log = run("elsewhere", raw=None)
    assert "copying" in log
    assert content(copied["bottle"]) == content(built["bottle"])


def test_only_the_categories_that_are_asked_for_are_copied(run):
    run(categories=("bottle", "cable"))
    copied, _ = run("elsewhere", raw=None, categories=("cable",))
    assert copied.keys() == {"cable"}
    assert not (copied["cable"].parents[1] / "bottle").exists()
    assert run("third", raw=None, categories=None)[0].keys() == {"bottle", "cable"}


def test_what_was_half_sent_is_no_record_and_is_sent_again(run, objects, bucket):
    run()
    whole = objects()
    del bucket[1][objects.place + "fingerprint.json"]
    del bucket[1][objects.place + next(name for name in whole if ".array_record" in name)]
    with pytest.raises(FileNotFoundError, match="no records in"):
        run("elsewhere", raw=None)
    _, log = run()
    assert "sending" in log
    assert objects().keys() == whole.keys()


@pytest.mark.parametrize("kind", ["cut", "flipped", "gone"])
def test_damaged_files_are_named_and_nothing_of_them_is_kept(run, objects, bucket, kind, tmp_path):
    run()
    name = next(n for n in objects() if ".array_record" in n)
    data, number = bucket[1].pop(objects.place + name)
    if kind != "gone":
        data = data[:-9] if kind == "cut" else bytes([data[0] ^ 1]) + data[1:]
        bucket[1][objects.place + name] = (data, number)
    with pytest.raises(ValueError, match=r"gs://") as error:
        run(kind, raw=None)
    assert f"{name} is damaged; delete it and build again" in str(error.value)
    left = [p for p in (tmp_path / kind).rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert left == []


@pytest.mark.parametrize("files", ['{"../../../evil": "0"}', "3", '{"a/b": "0"}'])
def test_a_list_of_files_that_leads_elsewhere_is_refused(run, objects, bucket, files, tmp_path):
    run()
    stored, number = bucket[1][objects.place + "fingerprint.json"]
    changed = json.loads(stored) | {"files": json.loads(files)}
    bucket[1][objects.place + "fingerprint.json"] = (json.dumps(changed).encode(), number)
    with pytest.raises(ValueError, match=r"gs://.* build"):
        run("elsewhere", raw=None)
    assert not list(tmp_path.rglob("evil"))


def test_the_command_line_sends_records_or_says_why_not(bucket, raw_dir, capsys):
    arguments = ["mvtec_ad", f"--raw_dir={raw_dir}", "--category=bottle"]
    assert build.main([*arguments, f"--data_dir={bucket[0]}/by_hand/"]) == 0
    assert f"sending the records to {bucket[0]}/by_hand/mvtec_ad" in capsys.readouterr().out
    assert "by_hand/mvtec_ad/bottle/1.0.0/fingerprint.json" in bucket[1]
    assert build.main([*arguments, "--data_dir=gs://nobody-has-this/x"]) == 1
    assert capsys.readouterr().err.startswith("error: gs://nobody-has-this/x/mvtec_ad: there is no")
    assert build.main([*arguments, "--data_dir=s3://shop/x"]) == 1
    assert "expected a folder here, or gs://" in capsys.readouterr().err


def test_what_is_put_into_the_bucket_by_a_console_does_not_matter(bucket):
    address, objects = bucket
    objects["console/"] = (b"", 1)
    objects["console/a/"] = (b"", 1)
    objects["console/a/x.txt"] = (b"1", 1)
    assert buckets.contents(f"{address}/console") == {"a/x.txt": 1}
    assert buckets.read(f"{address}/console", "b.txt") is None
    buckets.delete(f"{address}/console", ["b.txt"])
