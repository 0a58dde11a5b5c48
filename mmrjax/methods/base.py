"""The contract of a method: models, loss and anomaly score, and nothing else.

A new method is one file with a subclass of `Method`, one line in `METHODS`, one config and one row
of the parametrised contract test. The loop, evaluation and report serve all methods alike.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mmrjax import weights
from mmrjax.data import epochs
from mmrjax.data.records import Records
from mmrjax.methods import optim


def compute_dtype(name: str) -> jnp.dtype:
    """Resolves config.train.compute_dtype: "auto" is bfloat16 on accelerators, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


class Method:
    """Base class; images reach a method as RGB float32 [b, h, w, 3] in [0, 1].

    Variables are dicts of collections; "params" is what the gradient changes and may be empty.
    A method whose training is not the gradient of one loss replaces `update`, and one with several
    optimisers brings them as one `optax.partition` from `optimiser`.
    """

    name: str
    unroll = 1  # blocks of an encoder that are computed without a loop, see placement.py
    fields: tuple[str, ...] = ()  # configuration that not every method reads, by prefix
    # Shared fields in whose place the method has its own, such as {"train.epochs": "x.epochs"}.
    own: ClassVar[Mapping[str, str]] = {}
    trains = True  # has a gradient stage
    prepares = False  # has a `prepare` before it
    fits = False  # has a `fit` after it
    update = None  # (state, frozen, batch, key, progress) -> (state, logs); None: see state.update

    def __init__(self, config: ConfigDict):
        """Builds modules; no arrays yet."""
        self.config = self.configured(config)
        self.dtype = compute_dtype(config.train.compute_dtype)

    @property
    def score_is_peak(self) -> bool:
        """Whether an image's score is the maximum of its map, also of one put together."""
        return False

    @classmethod
    def configured(cls, config: ConfigDict) -> ConfigDict:
        """The configuration as this method trains by it: its `own` fields in the shared places."""
        if not cls.own:
            return config
        config = config.copy_and_resolve_references()
        for shared, own in cls.own.items():
            group, field = own.split(".")
            config.update_from_flattened_dict({shared: config[group][field]})
        return config

    def load_frozen(self) -> tuple[dict, dict]:
        """Loads what is never trained: ({name: variables}, facts for results.json)."""
        teacher, facts = weights.load_teacher(
            self.config.teacher.name, self.config.teacher.weights, self.config.teacher.seed
        )
        return {"teacher": teacher}, {"teacher": facts}

    def keep_labelled(
        self, records: Records, labelled: np.ndarray, indices: np.ndarray
    ) -> tuple[dict, dict]:
        """What it keeps of labelled defective images for training; by default nothing.

        Args:
          records: of the category.
          labelled: indices of defective records; often none.
          indices: of the good records that are trained on.

        Returns:
          ({name: arrays}, added to what is frozen while it trains; facts for results.json).
        """
        return {}, {}

    def init(self, key: jax.Array, frozen: dict) -> tuple[dict, dict]:
        """Draws or loads the variables: ({"params": …, …}, facts)."""
        raise NotImplementedError

    def optimiser(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """What turns gradients into updates; by default `config.optim`'s AdamW."""
        return optim.optimiser(self.config.optim, self.config.train.epochs, steps_per_epoch)

    def plan(self, records: Records, indices: np.ndarray) -> epochs.Plan:
        """How batches of the records `indices` are filled."""
        return epochs.Plan(self.config.train.batch_size)

    def loss(
        self, variables: dict, frozen: dict, batch: dict, key: jax.Array, progress: dict
    ) -> tuple[jax.Array, tuple[dict, dict]]:
        """The training loss.

        Args:
          variables: all collections; the gradient is taken over "params" only.
          frozen: from `load_frozen`.
          batch: "image" [b, h, w, 3], "weight" [b] (0 = padding row), "keys" [b] one per example;
            "domain" int32 [b], "foreground" bool [b, h, w] where its plan has them.
          key: of this step.
          progress: "step" and "epoch", int32 scalars.

        Returns:
          (scalar, (changed collections, logs)).
        """
        raise NotImplementedError

    def prepare(self, variables: dict, frozen: dict, batches: Iterable) -> tuple[dict, dict]:
        """Whatever is to be found out on training images before training, if `prepares`.

        Args:
          variables: as `init` gave them.
          frozen: from `load_frozen`.
          batches: as in `fit`, of up to PREPARED evenly spaced training images.

        Returns:
          (variables of the same structure, facts for results.json).
        """
        raise NotImplementedError

    def fit(
        self, variables: dict, frozen: dict, batches: Iterable, count: int, key: jax.Array
    ) -> dict:
        """Whatever follows the gradient stage, from un-augmented training images.

        Args:
          variables: all collections.
          frozen: from `load_frozen`.
          batches: of uint8 [b, h, w, 3] in evaluation geometry, with the number of real rows; may
            be gone through more than once.
          count: images in all batches together.
          key: of the run.

        Returns:
          The new variables.
        """
        raise NotImplementedError

    def predict(self, variables: dict, frozen: dict, images: jax.Array) -> dict:
        """Scores images: {"map": float32 [b, h, w], "score": float32 [b], "parts": {name: map}}."""
        raise NotImplementedError
