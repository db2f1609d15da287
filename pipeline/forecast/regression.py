"""Straight lines through few points, with what is not known of them: Gaussian regression under stated beliefs.

Observations y_i = w . z_i + noise, noise ~ N(0, (s r_i)^2 + m_i^2): s is the same for all and not known, r_i says how
much of it each feels, m_i is the known error of measuring y_i. The weights are believed to be N(mean, deviation^2)
before anything is seen, s to be lognormal; both are integrated over, so that what a prediction says widens with the
distance from the points by itself (Bishop, Pattern Recognition and Machine Learning, 2006, equations 3.49 to 3.59).
Torch-free.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 4000
SCATTERS = np.geomspace(0.005, 0.8, 13)  # values of s that are weighed against each other


@dataclass(frozen=True)
class Belief:
    """What is believed before any point is seen: of the weights, constant first, and of the scatter s."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    scatter: float  # the middle of s
    log_scatter_deviation: float = 1.0

    def scatter_weights(self) -> np.ndarray:
        """(13,) log of the belief in each of `SCATTERS`."""
        return -0.5 * ((np.log(SCATTERS) - np.log(self.scatter)) / self.log_scatter_deviation) ** 2


@dataclass(frozen=True)
class Lines:
    """The lines that agree with some points, one for each value of s: evidence (13,), means (13, K), and roots of
    covariances (13, K, K)."""

    log_evidence: np.ndarray
    means: np.ndarray
    roots: np.ndarray

    def draws(self, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(count, K) weights and (count,) values of s, as likely as they are."""
        weights = np.exp(self.log_evidence - self.log_evidence.max())
        chosen = random.choice(len(weights), size=count, p=weights / weights.sum())
        noise = random.standard_normal((count, self.means.shape[1]))
        return self.means[chosen] + np.einsum("nij,nj->ni", self.roots[chosen], noise), SCATTERS[chosen]


def fit_lines(
    rows: np.ndarray, y: np.ndarray, measured: np.ndarray, belief: Belief, felt: np.ndarray | float = 1.0
) -> Lines:
    """Lines through `y` (N,) over `rows` (N, K), whose first column is 1; `measured` and `felt` (N,) are m and r."""
    mean, deviation = np.array(belief.mean), np.array(belief.deviation)
    evidence, means, roots = [], [], []
    for scatter, weight in zip(SCATTERS, belief.scatter_weights(), strict=True):
        variance = (scatter * felt) ** 2 + measured**2
        precision = np.diag(deviation**-2.0) + (rows / variance[:, None]).T @ rows
        covariance = np.linalg.inv(precision)
        means.append(covariance @ (mean / deviation**2 + (rows / variance[:, None]).T @ y))
        roots.append(np.linalg.cholesky(covariance))
        spread = np.diag(variance) + (rows * deviation**2) @ rows.T  # of y, before it is seen
        residual = y - rows @ mean
        _, log_determinant = np.linalg.slogdet(spread)
        evidence.append(weight - 0.5 * (log_determinant + residual @ np.linalg.solve(spread, residual)))
    return Lines(np.array(evidence), np.array(means), np.array(roots))
