"""A trained network that another learns from: frozen, whatever its architecture, with inputs as it was trained on."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Teacher(nn.Module):
    """Maps the student's images to the network's logits.

    The images come normalised for the student and at its size; the network sees them normalised and sized for itself.

    Shape:
        images: (B, C, H, W) float
        returns: (B, V) float32
    """

    def __init__(
        self, network: nn.Module, num_classes: int, input_size: tuple[int, int], *, mean: tuple[float, ...],
        std: tuple[float, ...], student_mean: tuple[float, ...], student_std: tuple[float, ...],
    ):  # fmt: skip
        super().__init__()
        self.network, self.num_classes, self.input_size = network, num_classes, input_size
        own, theirs = (torch.tensor(one).double().view(1, -1, 1, 1) for one in (std, student_std))
        shift = torch.tensor(student_mean).double() - torch.tensor(mean).double()
        self.register_buffer("scale", (theirs / own).float())
        self.register_buffer("shift", (shift.view(1, -1, 1, 1) / own).float())
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """A teacher never trains: its batch norms and drop paths stay as in evaluation."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = images * self.scale + self.shift
        if images.shape[-2:] != self.input_size:
            resized = F.interpolate(images.float(), self.input_size, mode="bicubic", antialias=True)
            images = resized.to(images.dtype)
        return self.network(images).float()
