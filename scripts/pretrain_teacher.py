"""Trains the embedded teacher `fdsl18` on procedural images alone and writes its weights.

    python scripts/pretrain_teacher.py --output=mmrjax/weights/fdsl18.safetensors

The network is a ResNet-18 of reduced width, stem to layer 3, with BatchNorm. The written file has
BatchNorm folded in, and float16 numbers. No photograph and no file is read. The pictures come from
procedural/textures.py and procedural/scenes.py, the objective from procedural/objective.py. A
stopped run goes on from its last state (<output>.state, every five minutes), on CPU to the same
weights.
"""

import argparse
import functools
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import linen as nn
from flax import serialization, struct
from procedural import objective, stream

from mmrjax.models import backbones, resnet
from mmrjax.runtime import files, logs
from mmrjax.weights import layouts, resnet_names, storage

NAME = "fdsl18"
STATE_SECONDS = 300.0
LICENCE = "Apache-2.0 (trained by mmrjax on procedural images)"


class NormalisedResNet(nn.Module):
    """`models.resnet.ResNet` while it learns: BatchNorm instead of biases, the same names."""

    arch: resnet.Architecture

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = True) -> dict[int, jax.Array]:
        """Normalised RGB [b, h, w, 3] -> {layer: [b, h', w', c]}."""
        norm = functools.partial(_convolution, train=train)
        x = nn.relu(norm(images, self.arch.stem, 7, 2, "conv1"))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        features = {}
        for layer, (blocks, width) in enumerate(
            zip(self.arch.blocks, self.arch.widths, strict=True), 1
        ):
            for i in range(blocks):
                name, stride = f"layer{layer}_{i}", 2 if layer > 1 and i == 0 else 1
                y = nn.relu(norm(x, width, 3, stride, f"{name}/conv1"))
                y = norm(y, width, 3, 1, f"{name}/conv2")
                if stride != 1:
                    x = norm(x, width, 1, stride, f"{name}/downsample")
                x = nn.relu(x + y)
            features[layer] = x
        return features


def _convolution(x, features: int, size: int, stride: int, name: str, train: bool) -> jax.Array:
    x = nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name.replace("/", "__"),
    )(x)
    return nn.BatchNorm(
        not train, momentum=0.95, epsilon=1e-5, name=name.replace("/", "__") + "_norm"
    )(x)


def folded(params: dict, statistics: dict, arch: resnet.Architecture) -> dict:
    """Variables of `models.resnet.ResNet`: every BatchNorm folded into its convolution."""
    flat = {}
    for _, _, path in resnet_names.names(arch):
        name = path.replace("/", "__")
        norm, seen = params[f"{name}_norm"], statistics[f"{name}_norm"]
        scale = norm["scale"] / np.sqrt(seen["var"] + resnet_names.BATCH_NORM_EPSILON)
        flat[f"params/{path}/kernel"] = params[name]["kernel"] * scale
        flat[f"params/{path}/bias"] = norm["bias"] - seen["mean"] * scale
    return layouts.unflatten({name: np.asarray(leaf, np.float16) for name, leaf in flat.items()})


@struct.dataclass
class State:
    """Everything that changes in training."""

    step: jax.Array
    params: dict
    statistics: dict
    moments: optax.OptState


class Training:
    """The network, its optimiser and one step of it."""

    def __init__(self, arch: resnet.Architecture, steps: int, learning_rate: float):
        """Nothing is computed yet."""
        self.network = NormalisedResNet(arch)
        rate = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 20, steps)
        self._optimiser = optax.chain(
            optax.clip_by_global_norm(2.0),
            optax.adamw(rate, weight_decay=0.05, mask=_decayed),
        )
        self.step = jax.jit(self._step, donate_argnums=0)

    def init(self, seed: int) -> State:
        """The first state."""
        side = 32
        variables = self.network.init(jax.random.key(seed), jnp.zeros((1, side, side, 3)))
        scales = {name: jnp.array(objective.FIRST_SCALE) for name in objective.TERMS}
        params = {"network": variables["params"], "scales": scales}
        moments = self._optimiser.init(params)
        return State(jnp.zeros((), jnp.int32), params, variables["batch_stats"], moments)

    def _step(self, state: State, images: jax.Array, damage: jax.Array, key: jax.Array):
        """[e, v, h, w, 3] and [e, v, h, w] -> (state, logs)."""
        key = jax.random.fold_in(key, state.step)
        flat = backbones.build(NAME).normalise(images.reshape(-1, *images.shape[2:]) / 255.0)

        def objective_of(params):
            variables = {"params": params["network"], "batch_stats": state.statistics}
            features, changed = self.network.apply(variables, flat, mutable=["batch_stats"])
            value, logs = objective.loss(features, params["scales"], damage, key)
            return value, (changed["batch_stats"], logs)

        gradient = jax.value_and_grad(objective_of, has_aux=True)
        (value, (statistics, terms)), grads = gradient(state.params)
        updates, moments = self._optimiser.update(grads, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, statistics, moments), {"loss": value, **terms}


def _decayed(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def train(args: argparse.Namespace) -> State:
    """Runs the training up to step `args.stop`, from the last state if there is one."""
    arch = backbones.architecture(NAME)
    training = Training(arch, args.steps, args.learning_rate)
    state = training.init(args.seed)
    path = args.output.with_suffix(".state")
    if path.exists():
        state = serialization.from_bytes(state, path.read_bytes())
        logging.info("continuing at step %d from %s", state.step, path)
    start, began, last_saved, shown = int(state.step), time.monotonic(), time.monotonic(), {}
    source = stream.batches(
        args.seed, args.classes, args.episodes, args.views, start, args.stop, args.workers
    )
    key = jax.random.key(args.seed + 1)
    for images, damage in logs.progress(source, "pretraining", args.stop - start):
        state, values = training.step(state, images, damage, key)
        for name, value in jax.device_get(values).items():
            shown[name] = 0.98 * shown.get(name, value) + 0.02 * value
        step = int(state.step)
        if step % 100 == 0:
            rate = (step - start) * args.episodes * args.views / (time.monotonic() - began)
            words = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
            logging.info("step %d of %d: %s; %.0f images/s", step, args.steps, words, rate)
        if time.monotonic() - last_saved > STATE_SECONDS:
            files.write_bytes(path, serialization.to_bytes(state))
            last_saved = time.monotonic()
    files.write_bytes(path, serialization.to_bytes(state))
    return jax.device_get(state)


def command(args: argparse.Namespace) -> str:
    """The command line that makes the same weights; where they were written does not matter."""
    fields = [
        f"--{name}={value}" for name, value in vars(args).items() if name not in ("output", "stop")
    ]
    return " ".join(["python scripts/pretrain_teacher.py", *fields])


def main() -> None:
    """Parses the command line, trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a .safetensors file")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stop", type=int, help="leave after this step, to go on another time")
    parser.add_argument("--episodes", type=int, default=10, help="designs in a step")
    parser.add_argument("--views", type=int, default=6, help="views of a design")
    parser.add_argument("--classes", type=int, default=1040, help="textures")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    args = parser.parse_args()
    args.stop = args.steps if args.stop is None else min(args.stop, args.steps)
    logs.setup()
    state = train(args)
    if args.stop < args.steps:
        logging.info("stopped at step %d; the same command without --stop goes on", args.stop)
        return
    variables = folded(state.params["network"], state.statistics, backbones.architecture(NAME))
    facts = {"kind": "teacher", "arch": NAME, "licence": LICENCE, "command": command(args)}
    storage.write(args.output, variables, facts)
    logging.info("wrote %s, %.2f MB", args.output, args.output.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
