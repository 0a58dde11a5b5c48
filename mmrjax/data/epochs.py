"""The epoch table: which record stands in which step, for every epoch, from the seed alone.

Both feeding modes read by it, and the position in it is the step number, so a resumed run, another
number of devices or another feed sees the same batches.
"""

import math

import numpy as np


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Steps that show every example once; the last batch may be partly empty."""
    return math.ceil(examples / batch_size)


def epoch_table(
    indices: np.ndarray, batch_size: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffles the training examples of one epoch into batches.

    Args:
      indices: positions of the examples, [n].
      batch_size: global batch.
      seed: of the run.
      epoch: 0-based.

    Returns:
      (int32 [steps, batch] entries of `indices`, float32 [steps, batch] weights): rows that fill
      the last batch repeat the first example with weight 0.
    """
    steps = steps_per_epoch(len(indices), batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(len(indices))
    padding = steps * batch_size - len(indices)
    table = np.concatenate([indices[order], np.full(padding, indices[order[0]])])
    weight = np.concatenate([np.ones(len(indices)), np.zeros(padding)])
    shape = steps, batch_size
    return table.reshape(shape).astype(np.int32), weight.reshape(shape).astype(np.float32)
