"""Images as sequences of patches, and back.

Shape letters used in this package:

B  images in the micro-batch        H, W  image height and width, pixels
C  image channels                   P     patch side, pixels
N  patches per image = (H/P)(W/P)   K     visible patches per image
L  tokens = prefix tokens + patches D     encoder width        E  decoder width
V  classes
"""

from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) to (B, N, P*P*C): patches in row-major order, each pixel's channels together."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, P, P, C)
    return patches.reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, P*P*C) to (B, C, H, W): the inverse of `patchify`."""
    batch, _, size = patches.shape
    channels = size // (patch_size * patch_size)
    images = patches.reshape(batch, grid[0], grid[1], patch_size, patch_size, channels)
    images = images.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, P, columns, P)
    return images.reshape(batch, channels, grid[0] * patch_size, grid[1] * patch_size)
