"""SimMIM (arXiv:2111.09886), written from the paper: mask tokens enter the encoder, one linear layer predicts pixels.

Unlike a masked autoencoder's, the encoder reads every place, hidden or not, so there is no decoder; it costs more.
It may be a Swin, whose last tokens stand for more than a patch each: what is hidden and predicted is such a cell.
"""

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from models.encoders.drop_path import place_drop_path
from models.encoders.patches import patchify, unpatchify
from models.encoders.vit import Encoder, encode_embedded
from models.masked.masking import square_mask
from models.objectives.batch import Batch, Outcome
from models.objectives.config import SimMIMConfig


class SimMIM(nn.Module):
    """Maps a batch to the mean absolute error over its hidden pixels, as they are normalised; labels are not read."""

    def __init__(self, config: SimMIMConfig, encoder: Encoder | SwinTransformer | SwinTransformerV2, seed: int):
        super().__init__()
        self.config, self.encoder, self.seed = config, encoder, seed
        self.cell_size = encoder.feature_info[-1]["reduction"]  # pixels per side; a ViT's is a patch
        self.patches_per_cell = self.cell_size // encoder.patch_embed.patch_size[0]  # along a side
        self.grid = tuple(side // self.patches_per_cell for side in encoder.patch_embed.grid_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(encoder.num_features, self.cell_size**2 * encoder.in_chans)
        nn.init.zeros_(self.head.weight)  # as the head of the encoder: it begins with the mean colour
        nn.init.zeros_(self.head.bias)
        self.coins = place_drop_path(encoder, seed)

    def forward(self, batch: Batch) -> Outcome:
        self.coins.toss(batch.positions)
        masked = self.mask(batch.positions)
        target = patchify(batch.images.float(), self.cell_size)
        error = (self.predict(batch.images, masked).float() - target).abs().mean(dim=2)  # (B, N)
        hidden = masked.float()
        losses = (error.detach() * hidden).sum(dim=1) / hidden.sum(dim=1)
        return Outcome((error * hidden).sum() / hidden.sum(), {}, losses)

    def mask(self, positions: Tensor) -> Tensor:
        """(B, N) bool: True where the cell is hidden from the encoder."""
        side = self.config.mask_size // self.cell_size
        squares = (self.grid[0] // side) * (self.grid[1] // side)
        return square_mask(positions, self.grid, side, self.config.num_hidden(squares), self.seed)

    def predict(self, images: Tensor, masked: Tensor) -> Tensor:
        """(B, N, P*P*C): every cell's pixels, as they are normalised; `masked`, (B, N) bool, is what is hidden."""
        embedded = self.encoder.patch_embed(images)  # (B, N, D), of a Swin (B, rows, columns, D)
        hidden = masked.view(-1, *self.grid)
        for axis in (1, 2):
            hidden = hidden.repeat_interleave(self.patches_per_cell, dim=axis)
        hidden = hidden.reshape(*embedded.shape[:-1], 1)
        return self.head(self._encode(torch.where(hidden, self.mask_token.to(embedded.dtype), embedded)))

    def _encode(self, embedded: Tensor) -> Tensor:
        """(B, N, D): a token for every cell."""
        if isinstance(self.encoder, (SwinTransformer, SwinTransformerV2)):
            return self.encoder.norm(self.encoder.layers(embedded)).flatten(1, 2)
        return encode_embedded(self.encoder, embedded)[:, self.encoder.num_prefix_tokens :]

    def hidden_predictions(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, P*P*C) float32 each: of every hidden cell what is predicted, and its pixels as they are normalised."""
        masked = self.mask(positions)
        hidden = masked.unsqueeze(-1)
        parts = self.predict(images, masked).float(), patchify(images.float(), self.cell_size)
        predicted, target = (part.masked_select(hidden).view(len(images), -1, part.shape[2]) for part in parts)
        return predicted, target

    @torch.no_grad()
    def reconstruct(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images with their hidden cells filled in, and the images as the encoder saw them.

        Shape:
            images: (B, C, H, W) float, normalised
            returns: two of (B, C, H, W); hidden cells of the second are zero, the dataset's mean
        """
        masked = self.mask(positions)
        cells, hidden = patchify(images.float(), self.cell_size), masked.unsqueeze(-1)
        filled = torch.where(hidden, self.predict(images, masked).float(), cells)
        seen = cells.masked_fill(hidden, 0.0)
        return unpatchify(filled, self.cell_size, self.grid), unpatchify(seen, self.cell_size, self.grid)
