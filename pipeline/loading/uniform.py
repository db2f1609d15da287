"""`models.randomness.position_uniform` without torch, bit for bit, for those that ask where a mixture draws.

A test holds the two together.
"""

import zlib

import numpy as np

_WORD = (1 << 64) - 1
_GOLDEN, _INDEX = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def position_uniform(seed: int, purpose: str, positions: np.ndarray) -> np.ndarray:
    """(B,) float32, uniform in [0, 1): the first draw of each of `positions`, (B,) int64."""
    stream = np.uint64((seed * _GOLDEN ^ zlib.crc32(purpose.encode()) << 32) & _WORD)
    keys = _mix(positions.astype(np.uint64) * np.uint64(_GOLDEN) + stream)
    bits = _mix(keys + np.uint64(_INDEX))
    return (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def _mix(bits: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); arrays of uint64 wrap around."""
    for shift, factor in _ROUNDS:
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))
