"""A full disk, a loss that is not finite, damaged checkpoints: one line, and nothing earlier lost.

The runs are whole programs of a method so small that it trains at once.
"""

import contextlib
import errno
import json
import os
import pathlib
import resource

import jax
import jax.numpy as jnp
import optax
import pytest

from data_builders import build
from mmrjax import main, methods
from mmrjax.data import epochs
from mmrjax.evaluate import scoring
from mmrjax.methods import base, optim
from mmrjax.runtime import checkpoint, files

RECORDS_LIMIT = 32 * 1024  # bytes: less than the records of ten pictures
SAVE_LIMIT = 256 * 1024  # less than a checkpoint of the toy, more than all that a run logs
ADVICE = "the disk is full; make room and repeat the command, it continues what is saved"
LAST = 8  # steps: 10 pictures in batches of 8, 4 epochs


class Toy(base.Method):
    """Learns one mean picture; what differs from it is a defect."""

    name, title, stage_names = "toy", "Toy", ("train",)
    bad_loss = bad_update = -1  # steps at which something becomes NaN

    def load_frozen(self):
        return {}, {}

    def init(self, key, frozen):
        mean = jax.random.uniform(key, (64, 64, 3))
        ballast = jax.random.uniform(key, (512, 1024))  # a checkpoint of 2 MB
        return {"params": {"mean": mean, "ballast": ballast}}, {}

    def loss(self, stage, variables, frozen, batch, key, progress):
        error = jnp.mean((batch["image"] - variables["params"]["mean"]) ** 2)
        return jnp.where(progress["step"] == self.bad_loss, jnp.nan, error), ({}, {})

    def stages(self, records):
        train, plan = self.config.train, epochs.Plan(self.config.train.batch_size)
        steps = plan.steps_per_epoch(len(records))
        factor = optax.scale_by_schedule(lambda n: jnp.where(n == self.bad_update, jnp.nan, 1.0))
        tx = optax.chain(optim.optimiser(self.config.optim, train.epochs, steps), factor)
        rates = optim.learning_rates(self.config.optim, train.epochs)
        return [base.Stage("train", train.epochs, plan, tx, rates=rates)]

    def predict(self, variables, frozen, images):
        total = jnp.mean((images - variables["params"]["mean"]) ** 2, axis=-1)
        return {"map": total, "parts": {"all": total}}


@pytest.fixture
def program(tiny_args, tmp_path, monkeypatch, capfd):
    """Runs the program on the toy; returns its status and what it wrote to standard error."""
    monkeypatch.setitem(methods.METHODS, "toy", Toy)
    fields = ("method.names=toy", "ckpt.every_seconds=0", "train.seeds=1")
    args = [*tiny_args, *(f"--config.{field}" for field in fields)]

    def run(*extra: str) -> tuple[int, str]:
        capfd.readouterr()
        status = main.main([*args, *(f"--config.{field}" for field in extra)])
        return status, capfd.readouterr().err

    return run


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run" / "toy" / "parts" / "seed1"


def steps(run_dir) -> list[int]:
    return sorted(
        int(p.name) for p in (run_dir / "checkpoints" / "train").iterdir() if p.name.isdigit()
    )


def the_line(output: str) -> str:
    """The one error line, which is the last; no stack, no chatter of a library."""
    assert "Traceback" not in output
    assert "Exception ignored" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert output.splitlines()[-1] == line
    return line


# --- a full disk


@contextlib.contextmanager
def full_disk(limit: int):
    """No file may grow beyond `limit` bytes: a full disk to whoever writes, in C++ as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_records_are_built_leaves_none(program, tmp_path):
    with full_disk(RECORDS_LIMIT):
        status, output = program()
    assert status == 1
    assert the_line(output).endswith(ADVICE)
    left = [p.name for p in (tmp_path / "records" / "folder").iterdir()]
    assert left == [".parts.lock"]
    assert program()[0] == 0


def test_the_builder_alone_says_of_a_full_disk_what_the_system_says(tiny_raw, tmp_path, capfd):
    with full_disk(RECORDS_LIMIT):
        status = build.main(["folder", f"--raw_dir={tiny_raw}", f"--data_dir={tmp_path}"])
    assert status == 1
    assert "File too large" in the_line(capfd.readouterr().err)


def test_a_disk_that_fills_up_while_saving_keeps_the_checkpoint_before(
    program, run_dir, tmp_path, monkeypatch, caplog
):
    assert program()[0] == 0
    whole = (run_dir / "scores.csv").read_bytes()
    (tmp_path / "run").rename(tmp_path / "whole")
    save = checkpoint.Checkpoints.save
    with contextlib.ExitStack() as stack:

        def save_or_fill(self, step, tree):
            if step == 4:
                self.wait()
                stack.enter_context(full_disk(SAVE_LIMIT))
            save(self, step, tree)

        monkeypatch.setattr(checkpoint.Checkpoints, "save", save_or_fill)
        status, output = program()
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    assert status == 1
    line = the_line(output)
    assert f"no checkpoint could be written to {run_dir / 'checkpoints' / 'train'}" in line
    assert line.endswith(ADVICE)
    assert steps(run_dir) == [2, 3]
    assert program()[0] == 0
    assert f"resuming at step 3 of {LAST}" in caplog.messages
    assert steps(run_dir) == [LAST - 1, LAST]
    assert (run_dir / "scores.csv").read_bytes() == whole


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="not on this system")
def test_room_for_all_maps_is_taken_before_the_first_is_written(tmp_path):
    with scoring._array_file(tmp_path / "maps.npy", (100, 64, 64)):
        part = (tmp_path / "maps.npy.part").stat()
    assert part.st_blocks * 512 >= part.st_size > 100 * 64 * 64 * 4


def fills_up_at(monkeypatch, name: str) -> None:
    """The disk takes no more when the file `name` is written."""
    write = files.write_bytes

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_or_fail(path: pathlib.Path, data: bytes) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if path.name == name:
                patch.setattr(os, "fsync", full)
            write(path, data)

    monkeypatch.setattr(files, "write_bytes", write_or_fail)


@pytest.mark.parametrize("name", ["scores.csv", "000_heat.png", "results.json", "report.html"])
def test_a_disk_that_fills_up_while_results_are_written_keeps_the_earlier_ones(
    program, run_dir, tmp_path, monkeypatch, name
):
    assert program()[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob(name)}
    assert before
    with monkeypatch.context() as patch:
        fills_up_at(patch, name)
        # Another number of resamples: evaluated again.
        status, output = program("eval.bootstrap=21")
    assert status == 1
    assert name in the_line(output)
    assert the_line(output).endswith(ADVICE)
    if not name.endswith(".png"):  # pictures are drawn anew, and gallery.json comes after them
        assert {p: p.read_bytes() for p in before} == before
    assert not list((tmp_path / "run").rglob("*.part"))
    assert program("eval.bootstrap=21")[0] == 0
    assert (run_dir / "maps" / "gallery.json").exists()


# --- what is not finite


@pytest.mark.parametrize(("per_call", "last", "checked"), [(1, 5, "5 to 5"), (2, 4, "4 to 5")])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(
    program, run_dir, monkeypatch, per_call, last, checked
):
    monkeypatch.setattr(Toy, "bad_loss", 5)
    # One epoch has two steps, so a chunk has at most two.
    status, output = program(f"train.steps_per_call={per_call}")
    assert status == 1
    line = the_line(output)
    assert f"the loss is nan at step 5 (steps {checked} were checked together)" in line
    assert "lower optim.learning_rate" in line
    assert steps(run_dir)[-1] == last
    logged = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(logged[-1])["step"] == 5
    assert not (run_dir / "results.json").exists()


def test_a_parameter_that_is_not_finite_is_not_saved_even_if_no_loss_shows_it(
    program, run_dir, monkeypatch
):
    monkeypatch.setattr(Toy, "bad_update", LAST - 1)
    status, output = program()
    assert status == 1
    assert f"a parameter is not finite after step {LAST - 1};" in the_line(output)
    assert steps(run_dir)[-1] == LAST - 1
    assert not (run_dir / "results.json").exists()


# --- damaged checkpoints


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_reported_and_the_run_goes_on_from_the_one_before(
    program, run_dir, caplog
):
    """Other damage, and to other files: test_checkpoint.py."""
    assert program()[0] == 0
    whole = (run_dir / "scores.csv").read_bytes()
    (run_dir / "results.json").unlink()
    newest = run_dir / "checkpoints" / "train" / str(LAST)
    parts = (p for p in newest.rglob("*") if p.is_file())
    flip_a_bit(max(parts, key=lambda p: p.stat().st_size))
    assert program()[0] == 0
    told = (f"checkpoint {LAST} is damaged", f"checkpoint {LAST} cannot be read")
    assert any(m.startswith(told) for m in caplog.messages)
    assert f"resuming at step {LAST - 1} of {LAST}" in caplog.messages
    assert (run_dir / "checkpoints" / f"train-damaged-{LAST}").is_dir()
    assert (run_dir / "scores.csv").read_bytes() == whole
