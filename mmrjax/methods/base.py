"""The contract of a method: what the loop, the evaluation, the programs and the report ask of it.

A new method is one file with a subclass of `Method` and, if it has a network of its own, one file
in models/; one line in `METHODS` and one row of tests/methods/test_contract.py. Everything that
belongs to a method stands in its class: title, fields, rules, stages, loss, map and score.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mmrjax import weights
from mmrjax.data import epochs
from mmrjax.data.records import Records
from mmrjax.models import backbones
from mmrjax.runtime import placement


def compute_dtype(name: str) -> jnp.dtype:
    """Resolves config.train.compute_dtype: "auto" is bfloat16 on accelerators, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


FITTED_ON = "fitted_on"  # of variables: the training record of each image that `fit` saw, int32


def everything(path: str) -> bool:
    """The default of `Stage.trained`: all parameters."""
    return True


class Stage(NamedTuple):
    """One gradient stage of a training.

    Attributes:
      name: folder of the stage's checkpoints, checkpoints/<name>/.
      epochs: passes over the training images.
      plan: how the batches are filled.
      tx: turns gradients into updates. A dict names sub-trees of the parameters and gives each an
        optimiser of its own; `opt_state` has the same keys.
      augment: config.train.augment or its like: rrc_flip, rrc or none.
      rates: float32 [epochs], the learning rate of each epoch, for the log.
      trained: path of a parameter ("encoder/norm/scale") -> whether the stage trains it. The others
        get no gradient and have no part in `opt_state`.
      update: None for the gradient of `loss`. Otherwise (state, frozen, batch, key, progress, tx)
        -> (state, logs), in which `state` has `params`, `collections`, `opt_state`, `variables` and
        `replace`; the loop counts the step.
      rate_field: the configuration field that sets the learning rate, for error messages.
    """

    name: str
    epochs: int
    plan: epochs.Plan
    tx: optax.GradientTransformation | dict[str, optax.GradientTransformation]
    augment: str = "rrc_flip"
    rates: np.ndarray | None = None
    trained: Callable[[str], bool] = everything
    update: Callable | None = None
    rate_field: str = "optim.learning_rate"


class Method:
    """Base class of all methods.

    Images reach `loss`, `prepare`, `fit` and `predict` as RGB float32 [b, h, w, 3] in [0, 1].
    Variables are a dict of collections; the gradient changes "params" alone, which may be empty.
    """

    name: str
    title: str  # as papers write it
    # What the published numbers were made with: {fact: start of the weights file's name}.
    paper_weights: ClassVar[Mapping[str, str]] = {}
    # {"<dataset>/<category>": {metric: percent}} of the method's paper.
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    # Fields, by prefix, that may change between two calls without touching what is trained: those
    # of shared groups that the method does not read, and those that only choose a kernel.
    free: ClassVar[tuple[str, ...]] = ()
    stage_names: ClassVar[tuple[str, ...]] = ()  # of its `stages`, in order
    official = ""  # kind of its official checkpoints in mmrjax.convert; "": none is known
    # Fields that name the weights that training begins with; a trained run needs no such file.
    initial: ClassVar[tuple[str, ...]] = ()
    # {field: value}: kernels that exist on every platform, for an exported program.
    portable: ClassVar[Mapping[str, str]] = {}
    unroll = 1  # blocks of an encoder that are computed without a loop, see placement.py

    # Optional steps; a method that has one defines it.
    # prepare(variables, frozen, batches) -> (variables of the same structure, facts): looks at up
    #   to 64 training images before the first stage. `batches` yields (images, real rows).
    # fit(variables, frozen, batches, count, key) -> variables with new collections: follows the
    #   last stage. `batches` yields (images, real rows) of un-augmented training images, as often
    #   as it is gone through, and `batches.parts` is the number of parts that they show; `count` is
    #   the number of images in all batches together.
    prepare: Callable | None = None
    fit: Callable | None = None
    # torch_scorer(variables, frozen) -> the method in PyTorch, a `weights.torch_scorers.Scorer`,
    #   for ONNX and for the benchmark. Raises ValueError for options without a PyTorch form.
    torch_scorer: Callable | None = None
    # leave_out(variables, frozen, images, away) -> as `predict`, but as if some of the images that
    #   `fit` has seen had not been there. away: bool [b, count], for each image those to leave out,
    #   in the order of the batches of `fit`. Lets every training image help to set the threshold.
    leave_out: Callable | None = None

    def __init__(self, config: ConfigDict):
        """Builds modules; no arrays yet."""
        self.config = config
        self.dtype = compute_dtype(config.train.compute_dtype)

    @classmethod
    def defaults(cls) -> ConfigDict:
        """The configuration groups that the method owns: {group: fields with their defaults}."""
        return ConfigDict()

    @classmethod
    def groups(cls) -> set[str]:
        """The configuration groups that the method reads as its own, inherited ones included."""
        kinds = [kind for kind in cls.__mro__ if issubclass(kind, Method)]
        return {group for kind in kinds for group in kind.defaults()}

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        """Raises ValueError for values of the method's groups that cannot work."""

    @classmethod
    def check_run(cls, config: ConfigDict, images: int) -> None:
        """Raises ValueError if the method cannot train on so many images as configured."""

    @classmethod
    def leaves_out_exactly(cls, config: ConfigDict) -> bool:
        """Whether `leave_out` keeps the two promises on which a proven threshold rests.

        Its scores are those of a `fit` that never saw the images, however many images there are;
        and a training image more can only lower the score of any image. See
        evaluate/guarantees.py.
        """
        return False

    @classmethod
    def batch_sizes(cls, config: ConfigDict) -> set[int]:
        """The batch sizes of the gradient stages; known before JAX starts."""
        return set()

    @classmethod
    def weights_needed(cls, config: ConfigDict) -> dict[str, Callable[[], object]]:
        """The weight files that training reads, {which: a call that finds the file}."""
        teacher = config.teacher
        return {
            f"teacher {teacher.name} {teacher.weights}": lambda: weights.teacher_file(
                teacher.name, teacher.weights
            )
        }

    def precision(self) -> contextlib.AbstractContextManager:
        """The context in which the method's programs are traced: float32 means float32.

        Accelerators multiply float32 in fewer bits unless told otherwise.
        """
        if self.dtype == jnp.float32:
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()

    def backbone(self, layers: tuple[int, ...], resizes: bool = False) -> backbones.Backbone:
        """The configured teacher.

        Args:
          layers: to be tapped.
          resizes: whether the method itself brings images to a size that the teacher takes.

        Raises:
          ValueError: an unknown name or layer; an image size that the teacher does not take.
        """
        teacher = self.config.teacher
        official = {"positions": "official", "normed": True}
        changes = {field: teacher[field] for field in official if teacher[field] != official[field]}
        taps = tuple(teacher.taps)
        found = backbones.build(teacher.name, tuple(layers), self.dtype, taps, changes=changes)
        if not resizes:
            found.check_size(tuple(self.config.data.image_size))
        return found

    def load_frozen(self) -> tuple[dict, dict]:
        """Loads what is never trained: ({name: variables}, facts for results.json)."""
        name, file, seed = (self.config.teacher[k] for k in ("name", "weights", "seed"))
        _, teacher, facts = weights.load_teacher(name, file, seed)
        return {"teacher": teacher}, {"teacher": facts}

    def extras(self, records: Records, labelled: Records) -> tuple[dict, dict]:
        """Arrays beside the pictures that training reads, such as banks of defects or textures.

        Args:
          records: the good training images.
          labelled: the defective images that training may learn from; often none.

        Returns:
          ({name: arrays}, added to what is frozen in training; facts for results.json).
        """
        return {}, {}

    def init(self, key: jax.Array, frozen: dict) -> tuple[dict, dict]:
        """Draws or loads the variables of all stages: ({"params": …, …}, facts)."""
        raise NotImplementedError

    def stages(self, records: Records) -> list[Stage]:
        """The gradient stages, in order; none by default.

        Raises:
          ValueError: too few training images for a batch.
        """
        return []

    def loss(
        self, stage: str, variables: dict, frozen: dict, batch: dict, key: jax.Array, progress: dict
    ) -> tuple[jax.Array, tuple[dict, dict]]:
        """The training loss.

        Args:
          stage: name of the stage.
          variables: all collections; the gradient is taken over "params" only.
          frozen: from `load_frozen`, with `extras`.
          batch: "image" [b, h, w, 3], "weight" [b] (0 = padding row), "keys" [b] one per example;
            if the plan asks for them "domain" int32 [b], "foreground" bool [b, h, w], "second"
            [b, h, w, 3] (another picture of the category), "defective" bool [b], and with a recipe
            for defects "normal" [b, h, w, 3] (the image without its defect), "mask" and "tiny" bool
            [b, h, w], "kind" int32 [b] and sometimes "ignored" bool [b, h, w], see
            data/defects/rows.py.
          key: PRNG key of this step.
          progress: "step" and "epoch" of the stage, int32 scalars.

        Returns:
          (scalar, (changed collections, logs)).
        """
        raise NotImplementedError

    def predict(self, variables: dict, frozen: dict, images: jax.Array) -> dict:
        """Anomaly maps: {"map": float32 [b, h, w], "parts": {name: float32 [b, h, w]}}.

        A method whose score is not a function of "map" adds "scored", float32 [b, h, w], the map
        that its score is a function of.
        """
        raise NotImplementedError

    def score(self, maps: jax.Array) -> jax.Array:
        """The score of each image from its map, float32 [b, h, w] -> [b]; the maximum by default.

        The map of a tiled image is put together from its windows before.
        """
        return maps.max(axis=(1, 2))


@dataclasses.dataclass
class Trained:
    """A finished run, ready for evaluation."""

    method: Method
    variables: dict
    frozen: dict
    facts: dict
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def ready(self) -> tuple[dict, dict]:
        """(variables, frozen) as a scoring program takes them."""
        return placement.place((self.variables, self.frozen), self.method.dtype, self.method.unroll)
