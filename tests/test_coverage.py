"""The false alarms of a promised threshold over redrawn training pictures."""

import importlib.util
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_a_row_has_the_promise_and_the_false_alarms_of_other_parts(
    tiny_fields, tiny_raw, tmp_path, capsys, monkeypatch
):
    spec = importlib.util.spec_from_file_location("coverage_", ROOT / "scripts" / "coverage.py")
    coverage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coverage)
    seen = []
    train = coverage.loop.train
    monkeypatch.setattr(
        coverage.loop, "train", lambda *given: seen.append(given[1].table["id"]) or train(*given)
    )
    fields = tiny_fields(tiny_raw, tmp_path)
    more = ["--config.method.names=patchcore", "--config.patchcore.coreset_of=image"]
    coverage.main(["--config=configs/folder.py", "--parts=4", "--draws=2", *fields, *more])
    row = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"\| 4 \| 20 % \| (.*) % \| (.*) %, (.*) % \| [0-2] of 2 \|", row)
    mean, least, most = (float(x) for x in found.groups())
    assert least <= mean <= most <= 100
    assert [len(ids) for ids in seen] == [4, 4]
    assert set(seen[0]) != set(seen[1])
