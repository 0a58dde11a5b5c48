"""Reading a run leaves it alone: also when its newest checkpoint is damaged or half written."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.runs import restore
from mmrjax.runtime import checkpoint


def files(folder) -> dict:
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_damaged_or_unfinished_checkpoint_is_passed_over_and_stays_where_it_is(tmp_path):
    tree = {"a": jnp.arange(4.0)}
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.save(2, {"a": 2 * tree["a"]})
    for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # a training is writing it
    before = files(tmp_path)
    with checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        step, restored = checkpoints.restore(tree)
    assert step == 1
    np.testing.assert_array_equal(restored["a"], tree["a"])
    assert files(tmp_path) == before


def test_a_folder_above_runs_names_them(tmp_path):
    for seed in (1, 2):
        (tmp_path / "mmr" / "parts" / f"seed{seed}").mkdir(parents=True)
        (tmp_path / "mmr" / "parts" / f"seed{seed}" / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"no run folder: .*; runs in it: .*seed1, .*seed2$"
    ):
        restore.read_config(tmp_path)
    (tmp_path / "mmr" / "parts" / "seed1" / "config.json").write_text('{"cut off')
    with pytest.raises(FileNotFoundError, match=r"has no readable config\.json$"):
        restore.read_config(tmp_path / "mmr" / "parts" / "seed1")
