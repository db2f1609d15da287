"""Intervals of scores that are counts: the bootstrap over samples, without touching the samples.

A redrawing of n samples with replacement gives each kind of sample a multinomial count; so a score of counts is
redrawn from the counts alone, exactly, and a million images cost as much as a hundred (Efron and Tibshirani, An
Introduction to the Bootstrap, chapter 13: the percentile interval).
"""

from collections.abc import Callable

import numpy as np

LEVEL = 0.95


def interval_of_counts(
    counts: np.ndarray, score: Callable[[np.ndarray], np.ndarray], *, samples: int, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of `score`.

    Shape:
        counts: (K,) int, how many samples are of each kind
        score: maps (R, K) counts to (R,) scores
    """
    total = int(counts.sum())
    drawn = np.random.Generator(np.random.Philox(seed)).multinomial(total, counts / total, size=samples)
    low, high = np.nanquantile(score(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval_of_mean(values: np.ndarray, *, samples: int, seed: int = 0, chunk: int = 64) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of (S,) values that are not counts."""
    generator = np.random.Generator(np.random.Philox(seed))
    means = []
    for start in range(0, samples, chunk):
        drawn = generator.integers(0, len(values), (min(chunk, samples - start), len(values)))
        means.append(values[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
