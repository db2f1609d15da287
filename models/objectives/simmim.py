"""SimMIM (arXiv:2111.09886), written from the paper: mask tokens enter the encoder, one linear layer predicts pixels.

Unlike a masked autoencoder's, the encoder reads every place, hidden or not, so there is no decoder; it costs more.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.encoders.drop_path import place_drop_path
from models.encoders.patches import patchify, unpatchify
from models.encoders.vit import encode_embedded
from models.masked.masking import square_mask
from models.objectives.batch import Batch, Outcome
from models.objectives.config import SimMIMConfig


class SimMIM(nn.Module):
    """Maps a batch to the mean absolute error over its hidden pixels, as they are normalised; labels are not read."""

    def __init__(self, config: SimMIMConfig, encoder: VisionTransformer, seed: int):
        super().__init__()
        self.config, self.encoder, self.seed = config, encoder, seed
        self.patch_size = encoder.patch_embed.patch_size[0]
        self.grid = encoder.patch_embed.grid_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(encoder.embed_dim, self.patch_size**2 * encoder.in_chans)
        nn.init.zeros_(self.head.weight)  # as the head of the encoder: it begins with the mean colour
        nn.init.zeros_(self.head.bias)
        self.coins = place_drop_path(encoder, seed)

    def forward(self, batch: Batch) -> Outcome:
        self.coins.toss(batch.positions)
        masked = self.mask(batch.positions)
        target = patchify(batch.images.float(), self.patch_size)
        error = (self.predict(batch.images, masked).float() - target).abs().mean(dim=2)  # (B, N)
        hidden = masked.float()
        losses = (error.detach() * hidden).sum(dim=1) / hidden.sum(dim=1)
        return Outcome((error * hidden).sum() / hidden.sum(), {}, losses)

    def mask(self, positions: Tensor) -> Tensor:
        """(B, N) bool: True where the patch is hidden from the encoder."""
        side = self.config.mask_size // self.patch_size
        squares = (self.grid[0] // side) * (self.grid[1] // side)
        return square_mask(positions, self.grid, side, self.config.num_hidden(squares), self.seed)

    def predict(self, images: Tensor, masked: Tensor) -> Tensor:
        """(B, N, P*P*C): every patch's pixels, as they are normalised; `masked`, (B, N) bool, is what is hidden."""
        embedded = self.encoder.patch_embed(images)
        embedded = torch.where(masked.unsqueeze(-1), self.mask_token.to(embedded.dtype), embedded)
        return self.head(encode_embedded(self.encoder, embedded)[:, self.encoder.num_prefix_tokens :])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images with their hidden patches filled in, and the images as the encoder saw them.

        Shape:
            images: (B, C, H, W) float, normalised
            returns: two of (B, C, H, W); hidden patches of the second are zero, the dataset's mean
        """
        masked = self.mask(positions)
        patches, hidden = patchify(images.float(), self.patch_size), masked.unsqueeze(-1)
        filled = torch.where(hidden, self.predict(images, masked).float(), patches)
        seen = patches.masked_fill(hidden, 0.0)
        return unpatchify(filled, self.patch_size, self.grid), unpatchify(seen, self.patch_size, self.grid)
