"""The promise of a threshold: its name, the proof it rests on, a bound for sliding it, the words.

A promise is about a good image of a new part. The K parts of the calibration and the new part are
exchangeable: parts of one process, in any order. A part counts once, whatever the number of its
photographs: each weighs one over that number (hierarchical conformal prediction, Lee, Barber and
Willett 2023, arXiv 2306.06342). s(z; D) is the score of image z by a model of the parts D.

SPLIT: split conformal prediction. The K parts were held out of training, so their scores and the
new one are exchangeable. The new score exceeds the threshold with a probability of at most alpha.
It takes 1 / alpha - 1 held-out parts.

FULL: full conformal prediction, bounded by leaving parts out of a memory bank. Every part trains.
The proof needs what `Method.leaves_out_exactly` states: the bank of several parts is the union of
rows that each image chose without a look at others, as many an image as follow from K alone; and
rows more can only lower a score. For the proof, give the new part's images a place in the bank:

    R_k = s(z_k; all K parts and the new part, without part k)      never computed
    L_k = s(z_k; all K parts, without part k)                       `Scorer.left_out`
    s   = s(z; all K parts)                                         the score of the new image

R_1 … R_K and s are one and the same function of exchangeable parts, so they are exchangeable, and
the p-value of s among the R_k is valid: full conformal prediction. The bank of L_k has fewer rows
than that of R_k, so L_k >= R_k. More of the L_k than of the R_k reach s; the p-value among the L_k
is the larger one. An image is flagged by the threshold from the L_k only if full conformal
prediction would flag it too: at most alpha, with one bank and one fixed threshold. The price is
caution: the true rate lies below the promise by what one part more in the bank would change.

LEFT_OUT: leaving out without that proof. If rows are chosen among the patches of all images
(the coreset of the paper), or if whitening, expected distances or statistics by place are learnt
from all images, then the model without part k is no part of the model with all. The threshold then
is that of the jackknife, for which Barber, Candès, Ramdas and Tibshirani (2021, arXiv 1905.02928)
show that no rate can be promised without stability. Their jackknife+ and CV+, and cross-conformal
prediction (Vovk 2015, arXiv 1208.0806), promise 2 alpha: they score every new image by K models,
each without one part (or fold). Neither is used: a bank has the stronger promise with one
model, and other methods would have to train and to carry K models.

A promise holds on average over the draws of the K parts. One draw can be unlucky. `simultaneous`
bounds that: with a confidence of 95 % over the draw, at every threshold at once, so that a
threshold may be chosen after a look at the scores. The bound needs independent parts and scores;
under SPLIT it is proven (`band`). Scores of parts left out share their bank. For those, nothing of
the kind can be proven without further assumptions (Bian and Barber 2023, arXiv 2205.03647), and the
bound is marked as not proven. tests/evaluate/test_guarantees.py simulates all of it.
"""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict
from scipy import special

from mmrjax.methods import base

SPLIT, FULL, LEFT_OUT = "split conformal", "full conformal", "leave-one-out"
PROVEN = (SPLIT, FULL)
CONFIDENCE = 0.95  # of the simultaneous bound
STEPS = 200  # of the bound that results.json holds
ROUNDING = 1e-9  # error of sums of weights such as 1/3


def leaves_out(config: ConfigDict, kind: type[base.Method], parts: int) -> bool:
    """Whether every good image trains and the threshold comes from leaving parts out.

    "auto" takes the stronger promise: leaving out if that is proven for the method as configured,
    else a split if enough parts can be held out for the rate, else leaving out if the method can.

    Args:
      config: with `calibration`.
      kind: the method.
      parts: of the good training images.

    Raises:
      ValueError: calibration.way=leave_out, and the method cannot leave images out.
    """
    own = config.calibration
    if own.way == "split":
        return False
    if kind.leave_out is None:
        if own.way == "leave_out":
            raise ValueError(
                f"--config.calibration.way=leave_out: {kind.name} has no memory bank to leave "
                "images out of; give auto, which holds images out for it, or split"
            )
        return False
    enough = int(own.fraction * parts) >= parts_needed(own.target_fpr)
    return own.way == "leave_out" or kind.leaves_out_exactly(config) or not enough


def parts_needed(rate: float) -> int:
    """How many parts a false-positive rate needs."""
    return max(1, int(np.ceil(1 / rate - ROUNDING)) - 1)


def band(parts: int, confidence: float = CONFIDENCE) -> np.ndarray:
    """Bounds on the rates at the order statistics of independent scores, all valid at once.

    With probability `confidence`, at most the share band[i] of all good parts exceeds the
    (i + 1)-th largest of the scores, for every i. From the generalised Simes inequality, with half
    of the parts as its parameter (Bates, Candès, Lei, Romano and Sesia 2023, arXiv 2104.08279).

    Returns:
      float64 [parts], rising, up to 1.
    """
    k, below = max(1, parts // 2), parts - np.arange(parts)  # scores up to the (i + 1)-th largest
    usable = np.maximum(below, k)
    logs = special.gammaln(usable + 1) - special.gammaln(usable - k + 1)
    logs -= special.gammaln(parts + 1) - special.gammaln(parts - k + 1)
    return np.where(below < k, 1.0, 1 - np.exp((np.log(1 - confidence) + logs) / k))


def simultaneous(scores: np.ndarray, groups: Sequence[str]) -> dict[str, list[float]]:
    """The bound on the rate of good parts above a threshold, for every threshold at once.

    A part counts with its highest image, so that parts are independent; an image of a new part
    exceeds a threshold no more often than the highest image of the part does.

    Args:
      scores: float [n].
      groups: [n].

    Returns:
      {"at": rising scores, "bound": rates}: bound[i] holds for thresholds from at[i] on, up to
      at[i + 1]; below at[0] there is none. At most STEPS of each.
    """
    names = np.asarray(groups, str)
    tops = np.sort([np.max(scores[names == name]) for name in np.unique(names)])
    bound = band(len(tops))[::-1]  # at the smallest score first
    if len(tops) > STEPS:  # between two steps the bound of the lower one holds
        rows = np.unique(np.linspace(0, len(tops) - 1, STEPS).round().astype(int))
        tops, bound = tops[rows], bound[rows]
    return {"at": tops.tolist(), "bound": bound.tolist()}


def bound_at(steps: dict[str, list[float]], threshold: float) -> float:
    """The simultaneous bound at a threshold, from `simultaneous`."""
    at = int(np.searchsorted(steps["at"], threshold, side="right")) - 1
    return 1.0 if at < 0 else float(steps["bound"][at])


def sentence(guarantee: str, parts: int, promised: float, target: float) -> str:
    """The promise in plain words, for the report and the programs.

    Args:
      guarantee: SPLIT, FULL or LEFT_OUT.
      parts: that set the threshold.
      promised: the rate.
      target: the rate that was asked for.
    """
    rate, of = percent(promised), f"{parts} good part{'s' * (parts != 1)}"
    if is_provisional(promised, target):
        return f"provisional: {of} promise nothing below {rate} (asked for: {percent(target)})"
    proof = "proven" if guarantee in PROVEN else "expected from leaving parts out, not proven"
    more = f"; {of} allow no smaller rate" if promised > target + ROUNDING else ""
    return f"at most {rate} of good parts are rejected, {proof} ({guarantee}{more})"


def is_provisional(promised: float, target: float) -> bool:
    """Whether a threshold promises so much less than was asked for that it is a stopgap."""
    return promised > 2 * target + ROUNDING


def percent(rate: float) -> str:
    """A rate for people, with three digits."""
    return f"{100 * rate:.3g} %"
