"""Metrics of anomaly detection and localisation, exact and fast.

`measure` serves a test run, `summarise` several runs, `paired_difference` two methods. ranking.py
and pro.py define the metrics. Everything runs in NumPy except streaming.py, which counts the maps
of large test sets on device and is imported by its own name.

Every degenerate case has a value. p is the share of defect pixels (for images: of anomalies); "-"
means as defined, nothing special.

    case                               image metrics        pixel metrics
    no anomalous image                 None, with reason    None, with reason
    no good image                      None, with reason    -
    one image                          None, with reason    -, without intervals
    no pixel truth of any anomaly      -                    None, with reason
    no map                             -                    None, with reason
    no defect pixel in any view        -                    None, with reason
    mask of one anomaly empty in view  anomaly; good in     its pixels are normal; not in pro_mmr
                                       metrics_mode=mmr
    mask of one image all ones         -                    not in pro_mmr (official: raises, or
                                                            skips a batch of such masks)
    masks all ones, no normal pixel    -                    None, with reason
    only all-ones masks, good images   -                    pro_mmr alone None, with reason
    mask of a good image not empty     -                    mask ignored
    scores or maps constant            AUROC 0.5, AP p,     the same, aupro_0.3 0.15 (chance),
                                       F1 2p / (1 + p)      pro_mmr 0 (the official code raises)
    perfect binary map                 -                    all 1 (pro_mmr: official 0 / 0)
    perfect map upside down            AUROC 0, as it is    AUROC, aupro_0.3, pro_mmr 0
    ties                               one threshold        one threshold, also across FPR 0.3
    one outlier among normal pixels    -                    pro_mmr of its image 0, as the official
                                                            code has it; the others hardly move
    no defect under 10 px in view      -                    tiny_recall alone None, with reason
    fewer than 20 good images          -                    tiny_recall alone None, with reason
    NaN or infinity                    ValueError           ValueError: how many images, which first
    padding rows                       never counted        never counted
    maps of different sizes            -                    ValueError; streaming counts them
    no image                           ValueError           ValueError
"""

from mmrjax.metrics.domain import IMAGE_METRICS, METRICS, PIXEL_METRICS, TINY_METRICS
from mmrjax.metrics.exact import measure, paired_difference
from mmrjax.metrics.misses import MISSED, by_defect
from mmrjax.metrics.pro import pro_mmr_per_image, regions
from mmrjax.metrics.summary import (
    OFFICIAL_MODE,
    largest_errors,
    officially_rounded,
    summarise,
)

__all__ = [
    "IMAGE_METRICS",
    "METRICS",
    "MISSED",
    "OFFICIAL_MODE",
    "PIXEL_METRICS",
    "TINY_METRICS",
    "by_defect",
    "largest_errors",
    "measure",
    "officially_rounded",
    "paired_difference",
    "pro_mmr_per_image",
    "regions",
    "summarise",
]
