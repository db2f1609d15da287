"""The ViT paper's own masked patch prediction (arXiv:2010.11929, appendix B.1.2), written from the paper.

Embeddings are corrupted, not pixels, before positions are added: every patch enters the encoder at its own place, and
only the corrupted ones are predicted. Colours are of pixels in 0..1, so the statistics of normalisation are undone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.encoders.drop_path import place_drop_path
from models.encoders.patches import patchify, unpatchify
from models.encoders.vit import encode_embedded
from models.masked.corruption import Corruption, corrupt_patches
from models.objectives.batch import Batch, Outcome
from models.objectives.config import COLOUR_LEVELS, PatchColourConfig


class PatchColour(nn.Module):
    """Maps a batch to the mean loss over its corrupted patches; labels are not read.

    `mean` and `std`, one per channel, are what the images were normalised by.
    """

    def __init__(
        self, config: PatchColourConfig, encoder: VisionTransformer, seed: int,
        mean: Sequence[float], std: Sequence[float],
    ):  # fmt: skip
        super().__init__()
        self.config, self.encoder, self.seed = config, encoder, seed
        self.mean, self.std = tuple(mean), tuple(std)  # numbers, not buffers, which bf16 would round
        self.patch_size = encoder.patch_embed.patch_size[0]
        self.grid = encoder.patch_embed.grid_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        # At zero, as the head of the encoder: the first loss is log(512), or the target's own square.
        self.head = nn.Linear(encoder.embed_dim, config.outputs(encoder.in_chans, self.patch_size))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.coins = place_drop_path(encoder, seed)

    def forward(self, batch: Batch) -> Outcome:
        self.coins.toss(batch.positions)
        predicted, target = self.hidden_predictions(batch.images, batch.positions)
        if self.config.target == "pixels":
            losses = (predicted - target).square().mean(dim=(1, 2))
            return Outcome(losses.mean(), {}, losses.detach())
        losses = F.cross_entropy(predicted.flatten(0, 2), target.flatten(), reduction="none").view(target.shape)
        losses = losses.mean(dim=(1, 2))
        right = (predicted.argmax(dim=-1) == target).float().mean(dim=(1, 2))
        return Outcome(losses.mean(), {"patch_accuracy": right.sum()}, losses.detach())

    def hidden_predictions(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of every corrupted patch what is predicted, as `predict` has it, and its target, as `target` has it."""
        corruption = self.corruption(positions)
        return self.predict(images, corruption), _rows(self.target(images), corruption.corrupted)

    def corruption(self, positions: Tensor) -> Corruption:
        patches = self.grid[0] * self.grid[1]
        return corrupt_patches(positions, patches, self.config.num_corrupted(patches), self.seed)

    def predict(self, images: Tensor, corruption: Corruption) -> Tensor:
        """Of each corrupted patch: (B, M, cells, classes) float32 scores, or (B, M, P*P*C) pixels as normalised."""
        embedded = self.encoder.patch_embed(images)
        embedded = _rows(embedded, corruption.source)
        embedded = torch.where(corruption.masked.unsqueeze(-1), self.mask_token.to(embedded.dtype), embedded)
        tokens = encode_embedded(self.encoder, embedded)[:, self.encoder.num_prefix_tokens :]
        predicted = self.head(_rows(tokens, corruption.corrupted)).float()
        return predicted if self.config.target == "pixels" else predicted.unflatten(2, (self.config.cells**2, -1))

    def target(self, images: Tensor) -> Tensor:
        """Of each patch: (B, N, cells) int64 classes, or (B, N, P*P*C) float32 pixels as they are normalised.

        A class is red's level of 8, green's and blue's, as digits: 64 r + 8 g + b; with fewer channels, fewer digits.
        """
        if self.config.target == "pixels":
            return patchify(images.float(), self.patch_size)
        means = F.avg_pool2d(images.float(), self.patch_size // self.config.cells)  # (B, C, rows, columns) of cells
        classes = torch.zeros_like(means[:, 0], dtype=torch.int64)
        for channel, mean, std in zip(means.unbind(1), self.mean, self.std, strict=True):
            level = ((channel * std + mean) * COLOUR_LEVELS).floor().clamp(0, COLOUR_LEVELS - 1)
            classes = classes * COLOUR_LEVELS + level.long()
        return patchify(classes.unsqueeze(1), self.config.cells)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images with their corrupted patches painted as predicted, and without them: these are zero, the mean colour.

        A predicted class is painted in the middle of its levels.

        Shape:
            images: (B, C, H, W) float, normalised
            returns: two of (B, C, H, W)
        """
        corruption = self.corruption(positions)
        predicted = self.predict(images, corruption)
        if self.config.target != "pixels":
            predicted = self._paint(predicted.argmax(dim=-1), images.shape[1])
        patches = patchify(images.float(), self.patch_size)
        index = corruption.corrupted.unsqueeze(-1).expand_as(predicted)
        filled, seen = patches.scatter(1, index, predicted), patches.scatter(1, index, 0.0)
        return unpatchify(filled, self.patch_size, self.grid), unpatchify(seen, self.patch_size, self.grid)

    def _paint(self, classes: Tensor, channels: int) -> Tensor:
        """(B, M, cells) classes as normalised pixels, (B, M, P*P*C)."""
        digits = [classes // COLOUR_LEVELS**place % COLOUR_LEVELS for place in reversed(range(channels))]
        levels = [
            ((digit + 0.5) / COLOUR_LEVELS - mean) / std
            for digit, mean, std in zip(digits, self.mean, self.std, strict=True)
        ]
        colours = torch.stack(levels, dim=-1)  # (B, M, cells, C)
        side = self.config.cells
        colours = colours.unflatten(2, (side, side))
        for dim in (2, 3):
            colours = colours.repeat_interleave(self.patch_size // side, dim=dim)
        return colours.flatten(2)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, M, X): the rows of (B, N, X) that `index`, (B, M), names."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
