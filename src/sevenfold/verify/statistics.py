"""Intervals for what was measured on a sample, and how large a sample would decide.

All intervals are two-sided at ``confidence``; a gate that uses one bound therefore errs in at most
half of the rest (2.5 % at 0.95). Bootstraps are seeded: the same numbers give the same interval.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["proportion", "mean", "ratio", "exp_ratio", "measured"]
Array = NDArray[np.float64]

NUM_RESAMPLES = 2000
_RESAMPLE_CHUNK_ENTRIES = 250_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its interval from ``n`` samples; None for what is not finite or not known."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def metric_seed(metric: str) -> int:
    """Return a bootstrap seed that is the same on every machine, and another for every metric."""
    return zlib.crc32(metric.encode())


def wilson_interval(successes: float, n: int, confidence: float) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    Source:
        Wilson 1927; 10 of 10 at 0.95 gives a lower bound of 0.72, not 1.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a proportion")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    return low, 1.0 if successes == n else min(1.0, (centre + spread) / scale)


def estimate(
    kind: Kind, scores: Sequence[Sequence[float]], *, confidence: float, seed: int = 0
) -> Estimate:
    """Estimate a metric from its per-item scores.

    ``scores`` holds one entry an item: (score,) for ``proportion`` and ``mean``, (numerator,
    denominator) for ``ratio`` (sum over sum) and ``exp_ratio`` (its exponential: perplexity from
    nats and tokens). Items are resampled whole, so a long document counts as one sample.
    """
    columns = np.asarray(scores, dtype=np.float64)
    n = len(columns)
    if n == 0 or not np.isfinite(columns).all():
        return Estimate(value=None, low=None, high=None, n=n)
    value = float(_combine(kind, columns.sum(axis=0, keepdims=True), n)[0])
    if kind == "proportion":
        low, high = wilson_interval(float(columns[:, 0].sum()), n, confidence)
    else:
        sums = _resampled_sums(columns, seed)
        low, high = _bounds(_combine(kind, sums, n), n, confidence)
    return _finite(value, low, high, n)


def paired_loss(
    kind: Kind,
    now: Sequence[Sequence[float]],
    before: Sequence[Sequence[float]],
    *,
    higher_is_better: bool,
    confidence: float,
    seed: int = 0,
) -> Estimate:
    """Estimate how much worse ``now`` is than ``before`` on the same items; above 0 is worse.

    Items that are right or wrong get Tango's score interval, all else a paired bootstrap.
    """
    later, earlier = np.asarray(now, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if later.shape != earlier.shape:
        raise ValueError(f"paired samples differ in shape: {later.shape} and {earlier.shape}")
    n = len(later)
    if n == 0 or not (np.isfinite(later).all() and np.isfinite(earlier).all()):
        return Estimate(value=None, low=None, high=None, n=n)
    sign = -1.0 if higher_is_better else 1.0
    both = np.concatenate([later, earlier], axis=1)
    width = later.shape[1]

    def loss(sums: Array, count: int) -> Array:
        difference = _combine(kind, sums[:, :width], count) - _combine(kind, sums[:, width:], count)
        return sign * difference + 0.0  # never -0

    value = float(loss(both.sum(axis=0, keepdims=True), n)[0])
    if kind == "proportion" and np.isin(both, (0.0, 1.0)).all():
        worse = sign * (later - earlier)
        lost, gained = int((worse > 0).sum()), int((worse < 0).sum())
        low, high = tango_interval(lost, gained, n, confidence)
    else:
        low, high = _bounds(loss(_resampled_sums(both, seed), n), n, confidence)
    return _finite(value, low, high, n)


def tango_interval(lost: int, gained: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the score interval of the share of ``n`` items lost less the share gained.

    Unlike a bootstrap it has a width where nothing was lost or gained, and holds its level where
    items were only lost.

    Source:
        Tango 1998, "Equivalence test and confidence interval for the difference in proportions
        for the paired-sample design", equations 15 and 16.
    """
    if n <= 0 or min(lost, gained) < 0 or lost + gained > n:
        raise ValueError(f"{lost} lost and {gained} gained of {n} is not possible")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)

    def score(loss: float) -> float:
        """Standard errors between what was seen and a true ``loss``; falls as that rises."""
        b = (2 * n - lost + gained) * loss - lost - gained
        root = math.sqrt(max(0.0, b * b + 8 * n * gained * loss * (1 - loss)))
        share_gained = (root - b) / (4 * n)  # most likely, if ``loss`` is true
        variance = n * (2 * share_gained + loss * (1 - loss))
        off = lost - gained - n * loss
        return off / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, off)

    value = (lost - gained) / n
    return _where(score, z, -1.0, value), _where(score, -z, value, 1.0)


def _where(falling: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Return the place between ``low`` and ``high`` where ``falling`` comes down to ``level``."""
    if low == high:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _finite(value: float, low: float, high: float, n: int) -> Estimate:
    """Keep a value without its bounds (one sample), but no bounds without their value."""
    if not math.isfinite(value):
        return Estimate(value=None, low=None, high=None, n=n)
    if not (math.isfinite(low) and math.isfinite(high)):
        return Estimate(value=value, low=None, high=None, n=n)
    return Estimate(value=value, low=low, high=high, n=n)


def _combine(kind: Kind, sums: Array, n: int) -> Array:
    """Return the metric for each row of column sums."""
    if kind in ("proportion", "mean"):
        return sums[:, 0] / n
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios: Array = sums[:, 0] / sums[:, 1]
        return np.exp(ratios) if kind == "exp_ratio" else ratios


def _resampled_sums(columns: Array, seed: int) -> Array:
    """Return the column sums of NUM_RESAMPLES samples drawn with replacement, [resamples, c]."""
    n = len(columns)
    generator = np.random.default_rng(seed)
    chunk = max(1, min(NUM_RESAMPLES, _RESAMPLE_CHUNK_ENTRIES // n))
    sums = np.empty((NUM_RESAMPLES, columns.shape[1]))
    for start in range(0, NUM_RESAMPLES, chunk):
        part = sums[start : start + chunk]
        drawn = generator.integers(n, size=(len(part), n), dtype=np.int32)
        for index, column in enumerate(columns.T.copy()):
            part[:, index] = column[drawn].sum(axis=1)
    return sums


def _bounds(resampled: Array, n: int, confidence: float) -> tuple[float, float]:
    """Return the percentile interval, widened for small ``n`` as Student's t is.

    One sample says nothing about its spread: the interval is then infinite, as it is where some
    resample has no value.

    Source:
        Hesterberg 2015, "expanded percentile"; the t quantile by its Cornish-Fisher series.
    """
    if n < 2 or not np.isfinite(resampled).all():
        return -math.inf, math.inf
    z, free = NormalDist().inv_cdf(0.5 + confidence / 2), n - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    tail = NormalDist().cdf(-t * math.sqrt(n / free))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def samples_needed(
    kind: Kind, measured: Estimate, threshold: float, *, confidence: float
) -> int | None:
    """Return how many samples would decide, if they came out as those measured so far.

    Returns:
        None where no number would: the value is the threshold itself, or it is not known.
    """
    value, low, high = measured.value, measured.low, measured.high
    if value is None or low is None or high is None or value == threshold:
        return None
    if kind == "proportion":
        return _proportion_needed(value, threshold, confidence)
    bound = low if value > threshold else high
    factor = ((value - bound) / (value - threshold)) ** 2
    return math.ceil(measured.n * factor - 1e-6)


def _proportion_needed(value: float, threshold: float, confidence: float) -> int | None:
    def decides(n: int) -> bool:
        low, high = wilson_interval(value * n, n, confidence)
        return low >= threshold if value > threshold else high <= threshold

    enough = 1
    while not decides(enough):
        enough *= 2
        if enough > 10**9:
            return None
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if decides(middle):
            enough = middle
        else:
            too_few = middle
    return enough
