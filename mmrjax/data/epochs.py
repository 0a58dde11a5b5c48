"""The epoch table: which record stands in which step, for every epoch, from the seed alone.

Both feeding modes read by it, and the position in it is the step number, so a resumed run, another
number of devices or another feed sees the same batches.
"""

import dataclasses
import math

import numpy as np

from mmrjax.data.defects.rows import Recipe

# Draws apart from the shuffling of an epoch.
CATEGORY, SECOND, DEFECTIVE = 0xCA7, 0x2ED, 0xDEF


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a stage wants its batches filled.

    Attributes:
      batch_size: rows of a batch.
      last_batch: "pad" (rows of weight 0 fill an epoch's last batch) or "drop" (a batch that is not
        full is left out; BatchNorm must never see padding rows).
      per_category: images of each category in an epoch, drawn anew in every epoch; 0: all of them.
        A category with fewer images shows each of them several times.
      same: whether every epoch shows the same `per_category` images, drawn once.
      category: int32 [n], of the examples; None: all are of one category.
      defects: how some rows get a defect, see data/defects/rows.py; None: no row does. If every
        4th row gets one, there are one to three real ones: an epoch shows every example once as a
        real one, a batch holds no example twice, and all batches are full.
      defective: share of each category's images in an epoch that get a defect, in [0, 1]: exactly
        that many, drawn anew in every epoch. None: all rows that `defects` chooses.
      domain: int32 [n], of the examples; given, every batch holds as many of each domain as can be,
        and a domain with fewer examples is shown more often.
      foreground: whether a fourth channel tells where the part is, see foreground.py.
      fills: bool [n], of the examples; true: the part is all of the picture, and is not sought.
      batch_field: the configuration field that sets the batch size, for error messages.
    """

    batch_size: int
    last_batch: str = "pad"
    per_category: int = 0
    same: bool = False
    category: np.ndarray | None = None
    defects: Recipe | None = None
    defective: float | None = None
    domain: np.ndarray | None = None
    foreground: bool = False
    fills: np.ndarray | None = None
    batch_field: str = "train.batch_size"

    def __post_init__(self):
        """Raises ValueError for a batch that cannot be cut into equal shares, or fields at odds."""
        every = self.defects.every if self.defects else 1
        if every > 1 and self.batch_size % every:
            raise ValueError(
                f"every {every}th row of {self.batch_field}={self.batch_size} cannot be synthetic; "
                f"give a multiple of it, such as {every * 4}"
            )
        if self.last_batch not in ("pad", "drop"):
            raise ValueError(f"last_batch={self.last_batch!r}: choose one of pad, drop")
        if self.per_category and (self.synthetic or self.domain is not None):
            raise ValueError("per_category goes neither with balanced domains nor with real rows")

    @property
    def synthetic(self) -> int:
        """Rows of a batch that show no example as it is; 0 if all rows may get a defect."""
        every = self.defects.every if self.defects else 1
        return self.batch_size // every if every > 1 else 0

    def shown(self, examples: int) -> int:
        """Examples that an epoch shows."""
        if not self.per_category:
            return examples
        return self.per_category * len(np.unique(self._category(examples)))

    def steps_per_epoch(self, examples: int) -> int:
        """Steps of an epoch, in which every example is real once (of balanced domains: about)."""
        shown, real = self.shown(examples), self.batch_size - self.synthetic
        return shown // real if self.last_batch == "drop" else steps_per_epoch(shown, real)

    def check(self, examples: int) -> None:
        """Raises ValueError if so many examples do not fill a batch as planned."""
        if not self.steps_per_epoch(examples):
            raise ValueError(
                f"{self.shown(examples)} training images fill no batch of {self.batch_size}, and "
                f"this method trains on full batches only; lower {self.batch_field}"
            )
        self.table(examples, 0, 0)

    def table(self, examples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The batches of one epoch.

        Args:
          examples: number of all training examples.
          seed: the run's seed.
          epoch: 0-based.

        Returns:
          (int32 [steps, batch] numbers of examples, float32 [steps, batch] weights): rows that fill
          the last batch repeat the first example with weight 0.

        Raises:
          ValueError: a domain has too few examples for a batch without repetition.
        """
        if self.synthetic or self.domain is not None:
            return _planned_table(self, examples, seed, epoch)
        order = self._order(examples, seed, epoch)
        if self.last_batch == "drop":
            order = order[: len(order) // self.batch_size * self.batch_size]
        return _batches(order, self.batch_size)

    def seconds(self, table: np.ndarray, examples: int, seed: int, epoch: int) -> np.ndarray:
        """For each entry of a table another example of its category, int32 of the same shape.

        The only example of a category stands in for itself.
        """
        category = self._category(examples)
        others = [np.flatnonzero(category == c) for c in range(category.max() + 1)]
        place = np.zeros(examples, int)
        for members in others:
            place[members] = np.arange(len(members))
        rng = np.random.default_rng((seed, epoch, SECOND))
        size = np.array([len(members) for members in others])[category[table]]
        step = 1 + (rng.random(table.shape) * np.maximum(size - 1, 1)).astype(int)
        at = (place[table] + np.where(size > 1, step, 0)) % size
        flat = [others[c][i] for c, i in zip(category[table].flat, at.flat, strict=True)]
        return np.array(flat, np.int32).reshape(table.shape)

    def chosen(
        self, table: np.ndarray, weight: np.ndarray, examples: int, seed: int, epoch: int
    ) -> np.ndarray:
        """The entries of a table that get a defect: `defective` of each category, to the image.

        Args:
          table: from `table`, with its weights; rows that only fill a batch are never chosen.
          weight: float32, of the table's shape.
          examples: as for `table`.
          seed: as for `table`.
          epoch: as for `table`.

        Returns:
          bool of the table's shape.
        """
        rng = np.random.default_rng((seed, epoch, DEFECTIVE))
        category, is_chosen = self._category(examples)[table], np.zeros(table.shape, bool)
        for c in np.unique(category):
            rows = np.flatnonzero((category == c) & (weight > 0))
            count = round(self.defective * len(rows))
            is_chosen.flat[rng.choice(rows, count, replace=False)] = True
        return is_chosen

    def _category(self, examples: int) -> np.ndarray:
        return np.zeros(examples, int) if self.category is None else self.category

    def _order(self, examples: int, seed: int, epoch: int) -> np.ndarray:
        """The examples of an epoch, shuffled."""
        if not self.per_category:
            return np.random.default_rng((seed, epoch)).permutation(examples)
        category = self._category(examples)
        rng = np.random.default_rng((seed, 0 if self.same else epoch, CATEGORY))
        drawn = [self._drawn(np.flatnonzero(category == c), rng) for c in np.unique(category)]
        if self.same:
            rng = np.random.default_rng((seed, epoch))
        return rng.permutation(np.concatenate(drawn))

    def _drawn(self, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`per_category` of the examples of a category; all of them before one comes again."""
        rounds = -(-self.per_category // len(members))
        shown = np.concatenate([rng.permutation(members) for _ in range(rounds)])
        return shown[: self.per_category]


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Steps that show every example once; the last batch may be partly empty."""
    return math.ceil(examples / batch_size)


def _batches(order: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples in their order as (int32 [steps, batch], weights float32 [steps, batch])."""
    steps = steps_per_epoch(len(order), batch_size)
    padding = steps * batch_size - len(order)
    table = np.concatenate([order, np.full(padding, order[0])])
    weight = np.concatenate([np.ones(len(order)), np.zeros(padding)])
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
    order = rng.permutation(examples)  # without domains, that of `Plan._order`
    circles = [order[domain[order] == d] for d in np.unique(domain)]
    steps = plan.steps_per_epoch(examples)
    table = np.zeros((steps, plan.batch_size), np.int32)
    is_synthetic = np.zeros(plan.batch_size, bool)
    if plan.synthetic:
        is_synthetic[:: plan.defects.every] = True
    first = np.zeros(len(circles), int)
    turn = {False: 0, True: 0}
    for row in table:
        rows = {}
        for kind in (False, True):  # the real ones first: the others stand behind them
            count = int((is_synthetic == kind).sum())
            rows[kind] = (turn[kind] + np.arange(count)) % len(circles)
            turn[kind] += count
        taken = np.bincount(rows[False], minlength=len(circles))
        wanted = taken + np.bincount(rows[True], minlength=len(circles))
        _check_enough(wanted, circles, plan.batch_field)
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


def _check_enough(wanted: np.ndarray, circles: list[np.ndarray], batch_field: str) -> None:
    for count, circle in zip(wanted, circles, strict=True):
        if count > len(circle):
            where = " of one domain" if len(circles) > 1 else ""
            raise ValueError(
                f"a batch takes {count} different training images{where}, there are "
                f"{len(circle)}; lower {batch_field}"
            )
