"""A run: one method on one category with one seed, in a folder of its own.

main.py makes each run once; training, evaluation and report are handed what they need of it.
"""

import contextlib
import dataclasses
import pathlib

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mmrjax import methods
from mmrjax.data import judge, splits
from mmrjax.data import records as records_lib
from mmrjax.evaluate import guarantees
from mmrjax.evaluate import results as results_lib
from mmrjax.runs import pretrained
from mmrjax.runs import workdir as workdir_lib
from mmrjax.runtime import checkpoint, files, processes, trackers
from mmrjax.train import loop


@dataclasses.dataclass
class Run:
    """One training, its evaluation, and their folders.

    Attributes:
      config: the whole configuration.
      method: name of the method.
      records: all records of the category, or of what is joined.
      seed: seed of everything that is drawn.
      folder: <workdir>/<method>/<category>/seed<k>, with checkpoints and metrics.jsonl.
      results: folder of the evaluation: `folder`, or that of another view of the run.
      store: the checkpoints.
    """

    config: ConfigDict
    method: str
    records: records_lib.Records
    seed: int
    folder: pathlib.Path
    results: pathlib.Path
    store: checkpoint.Store

    def perform(self, mode: str) -> None:
        """Trains and evaluates, unless that is done; holds its folders meanwhile.

        Args:
          mode: "train", or "evaluate" for what is trained already.

        Raises:
          ValueError: the folder holds a run with another configuration or other data.
          Interrupted: after SIGTERM or SIGINT, once the state is saved.
        """
        written = {self.results} if mode == "evaluate" else {self.folder, self.results}
        with contextlib.ExitStack() as held:
            processes.first(lambda: _hold(held, written))
            if self._settle(mode):
                logging.info(
                    "%s: finished before, see %s", self.folder, self.results / "results.json"
                )
                return
            self._train_and_evaluate(mode)

    def _settle(self, mode: str) -> bool:
        """Takes the configuration to go on with; whether the results are there."""

        def settle() -> tuple[dict, bool]:
            settled = workdir_lib.settle(
                self.config, self.method, self.folder, self.records.digest, mode, self.store
            )
            return settled.to_dict(), workdir_lib.is_finished(self.results, settled)

        content, finished = processes.first(settle)
        self.config = ConfigDict(content)
        return finished

    def _train_and_evaluate(self, mode: str) -> None:
        config = self.config
        train, held_out, labelled, test = self.split()
        note = splits.few(train)
        if note:
            logging.warning("%s/%s: %s", self.records.dataset, self.records.category, note)
        method = methods.create(self.method, config)
        pretrained.fetch(method)  # in every process: each machine has a cache
        trained = loop.train(
            method, train, self.seed, self.folder, mode == "evaluate", labelled, self.store
        )
        trained.facts["notes"] = [*filter(None, (note, judge.note(config)))]
        if self.results != self.folder:  # another view: the report there shows the same training
            processes.first(self._copy_training)
        left_out = train if self._leaves_out(train, held_out) else None
        results = results_lib.evaluate(
            trained, test, held_out, config, self.seed, self.results, left_out
        )
        if self.results == self.folder:
            processes.first(lambda: trackers.tell_results(config, self.folder, results))
        self.store.send()

    def split(self) -> tuple[records_lib.Records, ...]:
        """Views of the records: (train, held out, labelled, test).

        Trained on are good images; those held out, good too, give the threshold (none, if it comes
        from leaving training images out, calibration.way); a method may learn
        from the labelled defective ones; the test has the column "unseen", whether the combination
        of defect and condition was kept from training.
        """
        records, track = judge.select(self.records, self.config, self.seed)
        is_good = records.table["label"][track.train] == records_lib.GOOD
        good, bad = (records.take(track.train[rows]) for rows in (is_good, ~is_good))
        fraction = 0 if self._leaves_out(good) else self.config.calibration.fraction
        train, held_out = splits.hold_out(good, fraction, self.seed)
        test = records.take(track.test)
        test.table["unseen"] = np.isin(track.test, track.unseen)
        return train, held_out, splits.apart(bad, held_out), test

    def _leaves_out(self, *good: records_lib.Records) -> bool:
        """Whether every good image trains, and the threshold comes from leaving each out."""
        parts = sum(len(np.unique(part.table["group"])) for part in good)
        return guarantees.leaves_out(self.config, methods.METHODS[self.method], parts)

    def _copy_training(self) -> None:
        for file in ("config.json", "metrics.jsonl"):
            if (self.folder / file).exists():
                files.write_text(self.results / file, (self.folder / file).read_text())


def _hold(held: contextlib.ExitStack, folders: set[pathlib.Path]) -> None:
    for folder in sorted(folders):  # two calls that wait for each other would wait for ever
        held.enter_context(files.held(folder))
