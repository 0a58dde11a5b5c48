"""mmrjax: industrial anomaly detection in JAX; trains on good parts, finds and locates defects.

    detector = mmrjax.train("parts/")
    for prediction in detector.predict(["a.png", "b.png"]):
        print(prediction.score, prediction.is_anomaly)

The functions import JAX when they are called, because its import takes a while.
"""

import types

from mmrjax import train as _loop  # the folder of the training loop, which imports nothing

__version__ = "0.1.0"


class _Training(types.ModuleType):
    """The module mmrjax.train, which is the function `mmrjax.train`, too."""

    def __call__(self, folder, workdir=None, *, method="auto", config="folder", fields=None):
        """Trains on a folder of good parts and returns its detector; see runs/api.py.

        `fields` are those of the configuration, as {"train.epochs": 40}.
        """
        from mmrjax import main
        from mmrjax.runs import api

        run = api.train(folder, workdir, method, config, fields or {}, main.main)
        return load(run)


_loop.__class__ = _Training


def load(workdir=None, target_fpr=None):
    """A trained run, ready to predict: `mmrjax.load(workdir).predict(images)`.

    See runs/detector.py; without a work directory the latest run in runs/.
    """
    from mmrjax.runs import detector as detector_lib

    detector = detector_lib.load(workdir, target_fpr)
    detector.exporter = _export
    return detector


def _export(detector, path):
    """Writes a detector's scorer to a file and returns its path."""
    from mmrjax.export import __main__ as export

    return export.write(detector, path)
