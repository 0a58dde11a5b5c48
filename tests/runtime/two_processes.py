"""The part of each of two processes in test_distributed.py: python two_processes.py ROLE …

`program INDEX PORT ARGUMENTS…` runs mmrjax.main and, at the end, prints what it wrote;
`parts INDEX PORT FOLDER RECORDS` tries the parts and writes what it saw to FOLDER/seen<INDEX>.json.
"""

import atexit
import json
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmrjax import main
from mmrjax.data import epochs, feed
from mmrjax.data import records as records_lib
from mmrjax.methods import base
from mmrjax.metrics import streaming
from mmrjax.runtime import checkpoint, logs, processes
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import loop

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
BATCH = 4
STOP_AT = 5


class Toy(base.Method):
    """One number per pixel that learns the mean image: compiles in a moment."""

    def load_frozen(self):
        return {}, {}

    def init(self, key, frozen):
        return {"params": {"image": jax.random.uniform(key, (16, 16, 3))}}, {}

    def stages(self, records):
        plan = epochs.Plan(self.config.train.batch_size)
        return [base.Stage("train", self.config.train.epochs, plan, optax.adam(0.1))]

    def loss(self, stage, variables, frozen, batch, key, progress):
        error = jnp.square(batch["image"] - variables["params"]["image"]).mean(axis=(1, 2, 3))
        return jnp.sum(error * batch["weight"]) / batch["weight"].sum(), ({}, {})


def program(index: str, port: str, *arguments: str) -> int:
    """Runs the program as one of two."""
    written = set()

    def note(event: str, args: tuple) -> None:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "shutil.rmtree")
        if changes or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            written.add(str(args[0]))

    sys.addaudithook(note)
    atexit.register(lambda: print("WRITTEN", json.dumps(sorted(written)), flush=True))
    joined = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={index}"]
    return main.main([*joined, *arguments])


def parts(index: str, port: str, folder: str, directory: str) -> int:
    """Tries agreement, feeding, training and checkpoints; then process 1 fails alone."""
    processes.FAREWELL_SECONDS = 0.5
    processes.initialize(f"localhost:{port}", 2, int(index))
    folder, seen = pathlib.Path(folder), {}
    seen["said by the first"] = processes.first(lambda: {"index": int(index), "list": [1, (2, 3)]})
    try:
        processes.first(lambda: int("no number" if index == "0" else "1"))
    except ValueError as e:
        seen["error"] = str(e)
    seen["agreed"] = processes.agree(10 * int(index), 5 - int(index))
    mesh = mesh_lib.make_mesh(fsdp=2)  # 4 devices, 2 in each process
    seen["own"] = np.flatnonzero(mesh_lib.own_rows(BATCH, mesh)).tolist()
    for mode in ("resident", "stream"):
        seen[mode] = feed_all(mode, directory, mesh)
    seen["histograms"] = count_pixels(mesh)
    seen["training"] = stop_and_resume(directory, folder / "run", signalled=index == "1")
    across = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2).T, mesh_lib.AXES)
    seen["checkpoint"] = save_and_restore(folder / "checkpoints", across)
    (folder / f"seen{index}.json").write_text(json.dumps(seen))
    return processes.run(lambda: 3 if index == "1" else processes.agree(1)[0] - 1)


def feed_all(mode: str, directory: str, mesh: jax.sharding.Mesh) -> dict:
    """All batches of one epoch, and which images this process decoded for them."""
    records = records_lib.load(directory)
    rows = np.flatnonzero(records.table["split"] == "train")
    records = records.take(rows)
    decoded, image = [], records.image
    records.image = lambda i, *rest: decoded.append(int(rows[i])) or image(i, *rest)
    options = {"resident_gib": 1.0, "max_side": 0, "plan": epochs.Plan(BATCH), "seed": 54}
    options |= {"steps_per_call": 1, "device_mesh": mesh}
    source = feed.Feed(records, mode=mode, **options)
    sums = []
    for chunk in source.chunks(0, source.steps_per_epoch):
        chunk = mesh_lib.gather(chunk)
        if source.resident:
            held = mesh_lib.gather(source.resident)
            chunk |= {name: array[chunk["index"]] for name, array in held.items()}
        sums.append([chunk["index"].tolist(), chunk["size"].tolist(), int(chunk["image"].sum())])
    return {"decoded": decoded, "batches": sums, "canvas": source.canvas}


def count_pixels(mesh: jax.sharding.Mesh) -> dict:
    """Bounds of the pixel metrics of some maps that every process has, counted by all devices."""
    rng = np.random.default_rng(0)
    maps = mesh_lib.replicate(rng.normal(size=(BATCH, 8, 8)).astype(np.float32), mesh)
    masks = np.zeros((3, 8, 8), bool)  # of the last map there is none: it is padding
    masks[:2, 2:5, 2:5] = True
    histograms = streaming.MapHistograms(mesh)
    histograms.add(maps, masks)
    return histograms.counted().bounds()


def stop_and_resume(directory: str, folder: pathlib.Path, signalled: bool) -> dict:
    """Trains until this process, or the other one, gets SIGTERM; and then to the end."""
    fields = ("data.image_size=16,16", "data.resize=16,16", "train.batch_size=4", "train.epochs=4")
    config = config_lib.load("configs/folder.py", (*fields, "eval.batch_size=4", "train.fsdp=2"))
    records = records_lib.load(directory)
    records = records.take(np.flatnonzero(records.table["split"] == "train"))
    add = logs.TrainLog.add

    def add_and_stop(self, step: int, values: dict) -> None:
        add(self, step, values)
        if step == STOP_AT and signalled:
            signal.raise_signal(signal.SIGTERM)

    logs.TrainLog.add = add_and_stop
    stopped = None
    try:
        loop.train(Toy(config), records, 1, folder)
    except processes.Interrupted as e:
        stopped = e.args
    logs.TrainLog.add = add
    trained = loop.train(Toy(config), records, 1, folder)
    sums = {
        name: float(x.sum()) for name, x in mesh_lib.gather(trained.variables["params"]).items()
    }
    return {"stopped": stopped, "sums": sums}


def save_and_restore(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> dict:
    """Saves an array whose parts lie in both processes, damages the newest save and restores."""
    values = np.arange(512 * 256, dtype=np.float32).reshape(512, 256)
    trees = [{"w": values + step, "b": np.float32(step)} for step in (3, 8)]
    where = mesh_lib.fsdp_shardings(trees[0], mesh)
    with checkpoint.Checkpoints(folder) as checkpoints:
        for step, tree in zip((3, 8), trees, strict=True):
            split = mesh_lib.put(tree, where)
            checkpoints.save(step, split)
        checkpoints.wait()
        processes.first(lambda: flip_bit(folder / "8"))
        step, restored = checkpoints.restore(mesh_lib.replicate(trees[0], mesh))
        left = processes.first(checkpoints.steps)
    same = all(np.array_equal(mesh_lib.gather(restored[name]), trees[0][name]) for name in "wb")
    mine = [list(shard.data.shape) for shard in split["w"].addressable_shards]
    return {"step": step, "same": same, "mine": mine, "left": list(left)}


def flip_bit(folder: pathlib.Path) -> None:
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


if __name__ == "__main__":
    sys.exit({"program": program, "parts": parts}[sys.argv[1]](*sys.argv[2:]))
