"""mmrjax: industrial anomaly detection in JAX; trains on good parts, finds and locates defects."""


def load(workdir, target_fpr=None):
    """A trained run, ready to predict: `mmrjax.load(workdir).predict(images)`.

    See detector.py, which is imported only now: JAX takes a while.
    """
    from mmrjax.runs import detector

    return detector.load(workdir, target_fpr)
