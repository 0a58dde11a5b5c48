"""mmrjax: industrial anomaly detection in JAX; trains on good parts, finds and locates defects."""


def load(workdir, target_fpr=None):
    """A trained run, ready to predict: `mmrjax.load(workdir).predict(images)`.

    See runs/detector.py. The function imports it, because the import of JAX takes a while.
    """
    from mmrjax.runs import detector

    return detector.load(workdir, target_fpr)
