"""The training transform that the peers' documentation shows: Pillow, Inception crop, flip, float32, normalised."""

import torch
from torchvision import transforms

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in every example


def training_transform(image_size: int) -> transforms.Compose:
    """From a Pillow image to (C, H, W) float32."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )


def tensor_transform(image_size: int):
    """From a (C, H, W) uint8 tensor to float32: the same steps in torchvision's second version."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, DEVIATION),
        ]
    )
