"""Sets of positions that grow together: a union-find, whose paths are cut short on the way."""

import numpy as np


class Joined:
    """Positions 0 to `count` - 1, each a set of its own at first; 8 bytes a position."""

    def __init__(self, count: int):
        self._parents = np.arange(count)

    def join(self, one: int, other: int) -> bool:
        """Whether the two were apart."""
        low, high = sorted((self._root(one), self._root(other)))
        self._parents[high] = low  # the first with each of the others makes no chain
        return low != high

    def are_apart(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(P,) bool of two (P,) arrays of positions."""
        return self._roots(ones) != self._roots(others)

    def _root(self, position: int) -> int:
        parents = self._parents
        while (parent := int(parents[position])) != position:
            parents[position] = position = int(parents[parent])  # path halving
        return position

    def _roots(self, positions: np.ndarray) -> np.ndarray:
        roots = self._parents[positions]
        while ((above := self._parents[roots]) != roots).any():
            roots = above
        self._parents[positions] = roots
        return roots
