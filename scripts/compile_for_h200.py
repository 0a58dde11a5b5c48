"""Compiles training or scoring for an H200 on a machine that has none: seconds, kernels, bytes.

    pip install 'jax[cuda12]'
    python scripts/compile_for_h200.py --task=train --batch=128
    python scripts/compile_for_h200.py --task=evaluate --batch=32 --hlo=/tmp/program.txt

No kernel is tried, so products run by what cuBLAS advises, and nothing tells how fast the program
is. What it does tell: which kernels XLA makes of the model, what they read and write at least, and
what several devices exchange (--devices=8). Uses parts of JAX that are not public; seen to work
with 0.10.2.
"""

import argparse
import collections
import os
import pathlib
import re
import sys
import time

import jax
import numpy as np
from jax.experimental import topologies

from mmrjax import bench, bench_model, methods, placement, scoring, state, train
from mmrjax import config as config_lib
from mmrjax import mesh as mesh_lib
from mmrjax.data import geometry

FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1}


def main() -> int:
    """Runs the command line; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/aebad.py")
    parser.add_argument("--task", choices=("train", "evaluate"), default="train")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="of training, in one call")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--hlo", type=pathlib.Path, help="file for the compiled program")
    arguments, overrides = parser.parse_known_args()
    fields = [field.removeprefix("--config.") for field in overrides]
    config = config_lib.load(arguments.config, [*bench.RANDOM, *fields])
    mesh = pretend(arguments.devices)
    lowered = lower(config, arguments, mesh)
    started = time.perf_counter()
    text = lowered.compile().as_text()
    print(f"compiled in {time.perf_counter() - started:.1f} s")
    if arguments.hlo:
        arguments.hlo.write_text(text)
    for kind, (count, size) in traffic(text).items():
        print(f"{count:5d} x {size / 1e6:9.1f} MB  {kind}")
    return 0


def pretend(devices: int) -> jax.sharding.Mesh:
    """A mesh of H200s that are not there; from here on the models are built as for them."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"  # later ones win
    jax.config.update("jax_platforms", "cpu")
    jax.devices()  # the plugin is found now
    jax.default_backend = lambda: "gpu"
    mesh_lib.on_nvidia = methods.mmr._has_flash_attention = lambda: True
    jax._src.xla_bridge.canonicalize_platform = lambda name: name if name == "cpu" else "cuda"
    described = {"target_config": H200, "topology": f"1x{devices}x1"}
    found = topologies.get_topology_desc(platform="cuda", topology_name="", **described)
    return jax.sharding.Mesh(np.array(found.devices)[:, None], mesh_lib.AXES)


def lower(config, arguments: argparse.Namespace, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The training step or the scorer, of shapes alone."""
    method = methods.METHODS["mmr"](config)
    frozen = method.load_frozen()[0]
    variables, _ = method.init(jax.random.key(0), frozen)

    def whole(tree):
        shape = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
            x.shape, x.dtype, sharding=mesh_lib.replicated(mesh)
        )
        return jax.tree.map(shape, tree)

    def split(shape, dtype, axis):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.batched(mesh, axis))

    if arguments.task == "evaluate":
        trained = train.Trained(method, variables, frozen, {}, mesh_lib.make_mesh(1))
        ready = whole(trained.ready)
        trained.mesh = mesh
        scorer = scoring.make_predict(trained, geometry.View.of(config, evaluation=True))
        pixels = (arguments.batch, *config.data.image_size, 3)
        return scorer.lower(*ready, split(pixels, np.uint8, 0))
    tx = method.optimiser(steps_per_epoch=1)
    step = state.make_train_step(method, tx, train.make_augment(config), 1, mesh)
    rows = arguments.steps, arguments.batch
    chunk = {"index": split(rows, np.int32, 1), "weight": split(rows, np.float32, 1)}
    resident = bench_model.resident_images(16)
    key = jax.eval_shape(lambda: jax.random.key(1))
    placed = placement.place(frozen, method.dtype)
    return step.lower(
        whole(state.create(variables, tx)), whole(placed), whole(resident), chunk, key
    )


def traffic(text: str) -> dict[str, tuple[int, int]]:
    """{kind of kernel: (how many, bytes)} of the largest computation of a compiled program.

    Bytes are those of operands and results; of an operand that a fusion takes slices of, those of
    the slices. What is read twice in a kernel, and workspaces of libraries, are not in it.
    """
    computations = _computations(text)
    kernels = ("fusion", "custom-call", "copy")
    largest = max(
        computations.values(), key=lambda c: sum(op in kernels for _, op, *_ in c.values())
    )
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for shape, op, operands, line in largest.values():
        if op not in kernels:
            continue
        size = _bytes(shape)
        called = re.search(r"calls=%([\w.\-]+)", line)
        if called:
            size += _read(computations[called[1]])
        else:
            size += sum(_bytes(largest[name][0]) for name in operands if name in largest)
        kind = re.search(r'custom_call_target="([^"]*)"|kind=(k\w+)', line)
        entry = found[(kind[1] or kind[2]) if kind else op]
        entry[0] += 1
        entry[1] += size
    by_size = sorted(found.items(), key=lambda item: -item[1][1])
    return {kind: (count, size) for kind, (count, size) in by_size}


def _read(fused: dict) -> int:
    total = 0
    for name, (shape, op, _, _) in fused.items():
        if op == "parameter":
            users = [(s, o) for s, o, operands, _ in fused.values() if name in operands]
            sliced = users and all(o in ("dynamic-slice", "slice", "gather") for _, o in users)
            total += sum(_bytes(s) for s, _ in users) if sliced else _bytes(shape)
    return total


def _computations(text: str) -> dict[str, dict[str, tuple[str, str, set[str], str]]]:
    """{computation: {instruction: (shape, operation, operands, line)}}."""
    found: dict = {}
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found.setdefault(head[1], {})
        elif row := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            operands = set(re.findall(r"%([\w.\-]+)", row[4].split("), ")[0]))
            current[row[1]] = (row[2], row[3], operands, line)
    return found


def _bytes(shape: str) -> int:
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    sides = ([int(n) for n in s.split(",") if n] for _, s in arrays)
    return sum(BYTES.get(d, 0) * int(np.prod(n)) for (d, _), n in zip(arrays, sides, strict=True))


if __name__ == "__main__":
    sys.exit(main())
