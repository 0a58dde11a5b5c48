"""Metrics of anomaly detection and localisation, exact and fast, in NumPy; no JAX.

`evaluate` and `curves` serve a test run, `summarise` a set of them, `paired_difference` two
methods; the single metrics are here for everyone else. Definitions: ranking.py and pro.py.
"""

from mmrjax.metrics.evaluation import (
    IMAGE_METRICS,
    METRICS,
    PIXEL_METRICS,
    curves,
    evaluate,
    paired_difference,
)
from mmrjax.metrics.pro import Regions, aupro, pro_curve, pro_mmr, pro_mmr_per_image, regions
from mmrjax.metrics.ranking import auroc, average_precision, f1_max
from mmrjax.metrics.summary import summarise

__all__ = [
    "IMAGE_METRICS",
    "METRICS",
    "PIXEL_METRICS",
    "Regions",
    "aupro",
    "auroc",
    "average_precision",
    "curves",
    "evaluate",
    "f1_max",
    "paired_difference",
    "pro_curve",
    "pro_mmr",
    "pro_mmr_per_image",
    "regions",
    "summarise",
]
