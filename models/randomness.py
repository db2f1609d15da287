"""Random numbers that belong to a sample, not to a rank: a hash of (seed, purpose, position, index).

Counter-based, so there is no generator state to save, and any rank, device or restart draws the same for the same
position. The mixer is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), on int64 with wrap-around.
"""

import zlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer that torch's int64 holds."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical shift right; torch's own keeps the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = bits * 1  # never in place: callers broadcast
    bits = (bits ^ _shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift(bits, 31)


@torch.compiler.assume_constant_result  # torch.compile cannot look into crc32, and need not
def _stream(seed: int, purpose: str) -> int:
    return _signed((seed * 0x9E3779B97F4A7C15) ^ (zlib.crc32(purpose.encode()) << 32))


def position_keys(seed: int, purpose: str, positions: Tensor) -> Tensor:
    """(B, 1) int64: all that the draws of a position for a purpose depend on, of positions (B,) int64."""
    return _mix(positions.unsqueeze(1) * _signed(0x9E3779B97F4A7C15) + _stream(seed, purpose))


def position_bits(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """64 random bits for each of `count` draws of each position.

    Shape:
        positions: (B,) int64
        returns: (B, count) int64
    """
    return _keyed_bits(position_keys(seed, purpose, positions), count)


def _keyed_bits(keys: Tensor, count: int) -> Tensor:
    index = torch.arange(1, count + 1, device=keys.device)
    return _mix(keys + index * _signed(0xD1B54A32D192ED03))


def keyed_uniform(keys: Tensor, count: int) -> Tensor:
    """(B, count) float32, uniform in [0, 1), 24 bits each, of `position_keys`."""
    return _shift(_keyed_bits(keys, count), 40).float() / (1 << 24)


def position_uniform(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """(B, count) float32, uniform in [0, 1); see `position_bits` and `keyed_uniform`."""
    return keyed_uniform(position_keys(seed, purpose, positions), count)
