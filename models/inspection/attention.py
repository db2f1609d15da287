"""Where a ViT looks: how far its attention reaches, and what of the image it brings to the read-out."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, nn

from models.inspection.attention_weights import attention_by_block, require_sequence
from models.inspection.panels import Panel, Scale, drawn, new_figure, panel_sheet

MOST_HEADS = 12  # that a picture shows


def mean_attention_distance(encoder: nn.Module, images: Tensor) -> Tensor:
    """(depth, heads) float32, pixels: how far from a patch it looks, weighted by attention, mean over all patches.

    The measure of arXiv:2010.11929, figure 7 right. Prefix tokens have no place: weights count as shares of what goes
    to patches.
    """
    require_sequence(encoder)
    distances, prefix = patch_distances(encoder).to(images.device), encoder.num_prefix_tokens

    def distance(weights: Tensor) -> Tensor:
        among = weights[:, :, prefix:, prefix:]  # (B, heads, N, N)
        reach = (among * distances).sum(dim=-1) / among.sum(dim=-1).clamp_min(1e-12)
        return reach.mean(dim=(0, 2))

    return torch.stack(attention_by_block(encoder, images, distance)).cpu()


def patch_distances(encoder: nn.Module) -> Tensor:
    """(N, N) float32: pixels between the centres of any two patches."""
    rows, columns = encoder.patch_embed.grid_size
    height, width = encoder.patch_embed.patch_size
    y, x = torch.meshgrid(torch.arange(rows) * height, torch.arange(columns) * width, indexing="ij")
    centres = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def readout_attention(encoder: nn.Module, images: Tensor) -> Tensor:
    """(B, heads, rows, columns): the last block's attention from the class token to each patch.

    Without a class token, the mean of what the patches give to each patch.
    """
    read = attention_by_block(encoder, images, lambda weights: _read_out(encoder, weights))[-1]
    return read.unflatten(-1, encoder.patch_embed.grid_size).cpu()


def attention_rollout(encoder: nn.Module, images: Tensor) -> Tensor:
    """(B, rows, columns): how much of each patch reaches the class token through all blocks (arXiv:2005.00928, 3.1).

    Attention is averaged over heads, half of each token is its own (the residual connection), and the blocks' matrices
    are multiplied. Without a class token, the mean over the patches.
    """

    def mixing(weights: Tensor) -> Tensor:
        return 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(weights.shape[-1], device=weights.device)

    flow, *later = attention_by_block(encoder, images, mixing)
    for block in later:
        flow = block @ flow
    return _read_out(encoder, flow).unflatten(-1, encoder.patch_embed.grid_size).cpu()


def _read_out(encoder: nn.Module, weights: Tensor) -> Tensor:
    """(..., N): the class token's row, or the patches' mean row, without the columns of prefix tokens."""
    prefix = encoder.num_prefix_tokens
    row = weights[..., 0, :] if has_class_token(encoder) else weights[..., prefix:, :].mean(dim=-2)
    return row[..., prefix:]


def has_class_token(encoder: nn.Module) -> bool:
    return getattr(encoder, "cls_token", None) is not None


def attention_distance_picture(distances: Tensor, encoder: nn.Module) -> Image.Image:
    """A dot per head over the block's number, beside the distance of a head that looks everywhere alike.

    Shape:
        distances: (depth, heads), of `mean_attention_distance`
    """
    depth, heads = distances.shape
    rows, columns = encoder.patch_embed.grid_size
    height, width = encoder.patch_embed.patch_size
    figure = new_figure(max(560, 110 + 24 * depth), 400)
    axes = figure.add_axes((0.12, 0.14, 0.84, 0.74))
    blocks = torch.arange(1, depth + 1).repeat_interleave(heads)
    axes.scatter(blocks.numpy(), distances.flatten().numpy(), s=18, color="#0072b2", label="one attention head")
    alike = patch_distances(encoder).mean().item()
    axes.axhline(alike, color="#d55e00", linestyle="--", label="attention spread evenly")
    axes.set_title(f"Attention distance, input {rows * height} × {columns * width} pixels", fontsize=11, weight="bold")
    axes.set_xlabel("block, from input to output")
    axes.set_ylabel("mean attention distance, pixels")
    axes.set_ylim(0, 1.12 * max(alike, distances.max().item()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, depth + 0.5)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return drawn(figure)


def heads_picture(
    attention: Tensor, shown: Sequence[np.ndarray], names: Sequence[str], *, class_token: bool
) -> Image.Image:
    """A row per image: the image, then the map of each head.

    Shape:
        attention: (B, heads, rows, columns), of `readout_attention`
        shown: per image (H, W, 3) in 0..1
    """
    heads = attention.shape[1]
    chosen = range(min(heads, MOST_HEADS))
    rows = [
        [
            Panel(image, "" if number else "image"),
            *(Panel(_by_largest(maps[head]), "" if number else f"head {head + 1}") for head in chosen),
        ]
        for number, (image, maps) in enumerate(zip(shown, attention, strict=True))
    ]
    who = "the class token" if class_token else "the patches, on average,"
    some = f" Heads 1 to {MOST_HEADS} of {heads}." if heads > MOST_HEADS else ""
    note = f"Where {who} looks in the last block." if class_token else f"Where {who} look in the last block."
    scale = Scale("attention, relative to the map's largest", 0, 1)
    return panel_sheet(rows, title="Attention of the last block", note=note + some, row_names=names, scale=scale,
                       panel_pixels=96)  # fmt: skip


def rollout_picture(
    rollout: Tensor, shown: Sequence[np.ndarray], names: Sequence[str], *, class_token: bool
) -> Image.Image:
    """Each image beside its rollout.

    Shape:
        rollout: (B, rows, columns), of `attention_rollout`
        shown: per image (H, W, 3) in 0..1
    """
    rows = [
        [Panel(image, "" if number else "image"), Panel(_by_largest(flow), "" if number else "rollout")]
        for number, (image, flow) in enumerate(zip(shown, rollout, strict=True))
    ]
    where = "the class token" if class_token else "the patches, on average,"
    note = f"How much of each patch reaches {where} through all blocks: attention multiplied from block to block."
    scale = Scale("share, relative to the map's largest", 0, 1)
    return panel_sheet(rows, title="Attention rollout", note=note, row_names=names, scale=scale, panel_pixels=144)


def _by_largest(values: Tensor) -> np.ndarray:
    return (values / values.max().clamp_min(1e-30)).numpy()
