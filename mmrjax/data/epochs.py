"""The epoch table: which record stands in which step, for every epoch, from the seed alone.

Both feeding modes read by it, and the position in it is the step number, so a resumed run, another
number of devices or another feed sees the same batches.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a method wants its batches filled.

    Attributes:
      batch_size: rows of a batch.
      synthetic_every: every so-many-th row, from the first, is to become a synthetic defect (4:
        one to three real ones); 0: none. An epoch shows every example once as a real one, a batch
        holds no example twice, and all batches are full.
      domain: int32 [n], of the examples; given, every batch holds as many of each domain as can be,
        and a domain with fewer examples is shown more often.
      foreground: whether a fourth channel tells where the part is, see foreground.py.
      fills: bool [n], of the examples; true: the part is all of the picture, and is not sought.
    """

    batch_size: int
    synthetic_every: int = 0
    domain: np.ndarray | None = None
    foreground: bool = False
    fills: np.ndarray | None = None

    def __post_init__(self):
        """Raises ValueError for a batch that cannot be cut into equal shares."""
        every = self.synthetic_every
        if every and (every == 1 or self.batch_size % every):
            raise ValueError(
                f"every {every}th row of train.batch_size={self.batch_size} cannot be synthetic; "
                f"give a multiple of it, such as {max(every, 2) * 4}"
            )

    @property
    def synthetic(self) -> int:
        """Synthetic rows of a batch."""
        return self.batch_size // self.synthetic_every if self.synthetic_every else 0

    def steps_per_epoch(self, examples: int) -> int:
        """Steps of an epoch, in which every example is real once (of balanced domains: about)."""
        return steps_per_epoch(examples, self.batch_size - self.synthetic)

    def table(self, examples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """As `epoch_table`, over the positions 0 to `examples`.

        Raises:
          ValueError: a domain has too few examples for a batch without repetition.
        """
        if not self.synthetic and self.domain is None:
            return epoch_table(np.arange(examples), self.batch_size, seed, epoch)
        return _planned_table(self, examples, seed, epoch)


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


def _planned_table(
    plan: Plan, examples: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Full batches of real and synthetic rows, the domains in turn.

    The examples of a domain stand in a circle in random order. Each batch takes the next ones as
    real, and those behind them, which are real later, as synthetic.
    """
    domain = np.zeros(examples, int) if plan.domain is None else plan.domain
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(examples)  # without domains, that of `epoch_table`
    circles = [order[domain[order] == d] for d in np.unique(domain)]
    steps = plan.steps_per_epoch(examples)
    table = np.zeros((steps, plan.batch_size), np.int32)
    is_synthetic = np.zeros(plan.batch_size, bool)
    if plan.synthetic:
        is_synthetic[:: plan.synthetic_every] = True
    first = np.zeros(len(circles), int)
    turn = {False: 0, True: 0}
    for row in table:
        rows = {}
        for kind in (False, True):  # the real ones first: the others stand behind them
            count = int((is_synthetic == kind).sum())
            rows[kind] = (turn[kind] + np.arange(count)) % len(circles)
            turn[kind] += count
        taken = np.bincount(rows[False], minlength=len(circles))
        _check_enough(taken + np.bincount(rows[True], minlength=len(circles)), circles)
        row[~is_synthetic] = _next(circles, first, rows[False])
        row[is_synthetic] = _next(circles, first + taken, rows[True])
        first += taken
    return table, np.ones(table.shape, np.float32)


def _next(circles: list[np.ndarray], first: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The example of each row, from the circle `rows` names; each circle is read from `first`."""
    at = first.copy()
    found = np.zeros(len(rows), np.int32)
    for i, d in enumerate(rows):
        found[i] = circles[d][at[d] % len(circles[d])]
        at[d] += 1
    return found


def _check_enough(wanted: np.ndarray, circles: list[np.ndarray]) -> None:
    for count, circle in zip(wanted, circles, strict=True):
        if count > len(circle):
            where = " of one domain" if len(circles) > 1 else ""
            raise ValueError(
                f"a batch takes {count} different training images{where}, there are "
                f"{len(circle)}; lower train.batch_size"
            )
