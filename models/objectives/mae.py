"""Masked autoencoder (arXiv:2111.06377), written from the paper: predict the pixels of hidden patches."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.encoders.drop_path import place_drop_path
from models.encoders.patches import patchify, unpatchify
from models.encoders.vit import encode_visible
from models.masked.decoder import PixelDecoder
from models.masked.masking import PatchMask, block_patch_mask, random_patch_mask
from models.objectives.batch import Batch, Outcome
from models.objectives.config import MaskedAutoencoderConfig


class MaskedAutoencoder(nn.Module):
    """Maps a batch to the mean squared error over its hidden patches; labels are not read."""

    def __init__(self, config: MaskedAutoencoderConfig, encoder: VisionTransformer, seed: int):
        super().__init__()
        self.config, self.encoder, self.seed = config, encoder, seed
        self.patch_size = encoder.patch_embed.patch_size[0]
        self.grid = encoder.patch_embed.grid_size
        self.decoder = PixelDecoder(
            config.decoder,
            encoder_dim=encoder.embed_dim,
            grid=self.grid,
            prefix=encoder.num_prefix_tokens,
            patch_dim=self.patch_size**2 * encoder.in_chans,
        )
        self.coins = place_drop_path(encoder, seed)

    def forward(self, batch: Batch) -> Outcome:
        self.coins.toss(batch.positions)
        mask = self.mask(batch.positions)
        error = (self.predict(batch.images, mask).float() - self.target(batch.images)).square().mean(dim=2)  # (B, N)
        hidden = mask.masked.float()
        losses = (error.detach() * hidden).sum(dim=1) / hidden.sum(dim=1)
        return Outcome((error * hidden).sum() / hidden.sum(), {}, losses)

    def mask(self, positions: Tensor) -> PatchMask:
        if self.config.sampling == "blocks":
            return block_patch_mask(positions, self.grid, self.config.mask_ratio, self.seed)
        return random_patch_mask(positions, self.grid[0] * self.grid[1], self.config.mask_ratio, self.seed)

    def predict(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, N, P*P*C): the decoder's prediction for every patch, in the space of `target`."""
        return self.decoder(encode_visible(self.encoder, images, mask.visible), mask.visible)

    def target(self, images: Tensor) -> Tensor:
        """(B, N, P*P*C) float32: pixels, normalised within each patch unless the config says otherwise (section 3)."""
        patches = patchify(images.float(), self.patch_size)
        if not self.config.normalise_target:
            return patches
        mean, deviation = _patch_statistics(patches)
        return (patches - mean) / deviation

    def hidden_predictions(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, P*P*C) float32 each: of every hidden patch what is predicted, and its target."""
        mask = self.mask(positions)
        hidden = mask.masked.unsqueeze(-1)
        parts = self.predict(images, mask).float(), self.target(images)
        predicted, target = (part.masked_select(hidden).view(len(images), -1, part.shape[2]) for part in parts)
        return predicted, target

    @torch.no_grad()
    def reconstruct(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images with their hidden patches filled in by the decoder, and the images as the encoder saw them.

        Where targets are normalised, a hidden patch is scaled back with its true mean and deviation, as MAE's figures
        do: the picture shows structure, not a forecast of brightness.

        Shape:
            images: (B, C, H, W) float, normalised
            returns: two of (B, C, H, W); hidden patches of the second are zero, the dataset's mean
        """
        mask = self.mask(positions)
        patches = patchify(images.float(), self.patch_size)
        predicted = self.predict(images, mask).float()
        if self.config.normalise_target:
            mean, deviation = _patch_statistics(patches)
            predicted = predicted * deviation + mean
        hidden = mask.masked.unsqueeze(-1)
        filled = torch.where(hidden, predicted, patches)
        seen = patches.masked_fill(hidden, 0.0)
        return unpatchify(filled, self.patch_size, self.grid), unpatchify(seen, self.patch_size, self.grid)


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch, (B, N, 1) each; the 1e-6 keeps a constant patch finite."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
