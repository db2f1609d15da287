"""How many patches a share of them is. Torch-free, so that plans count as the masks do."""

import math


def patches_of_share(num_patches: int, share: float) -> int:
    """floor(num_patches * share) of the numbers as they are written: 0.58 of 50 is 29, and 28.999999999999996 in
    floating point."""
    return math.floor(num_patches * share + 1e-9)
