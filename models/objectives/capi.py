"""CAPI, masked latent prediction (arXiv:2502.08769), written from the paper: predict the cluster of hidden patches.

A teacher, the moving average of the encoder, sees the whole image; a clustering head, trained beside it, assigns its
patch latents to prototypes; the student sees a few patches and predicts the assignments of some of the others.
"""

import copy
import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.encoders.drop_path import place_drop_path
from models.encoders.vit import encode_embedded, encode_visible
from models.masked.clustering import ClusteringHead, PrototypeHead, balanced_assignments, soft_cross_entropy
from models.masked.masking import PatchMask, choose_masked, inverse_block_mask
from models.masked.predictor import LatentPredictor
from models.objectives.batch import Batch, Factors, Outcome, Progress
from models.objectives.config import CapiConfig


class Capi(nn.Module):
    """Maps a batch to the loss of the predictions plus that of the clustering; labels are not read.

    No gradient passes between the two: the clustering head alone learns from its own loss, everything else from the
    predictions. So their sum is minimised by one optimizer as each would be by one of its own.
    """

    def __init__(self, config: CapiConfig, encoder: VisionTransformer, seed: int):
        super().__init__()
        self.config, self.encoder, self.seed = config, encoder, seed
        self.grid, self.prefix = encoder.patch_embed.grid_size, encoder.num_prefix_tokens
        self.predictor = LatentPredictor(
            encoder.embed_dim, config.predictor_depth, encoder.blocks[0].attn.num_heads, self.grid, self.prefix,
            config.predictor_drop_path,
        )  # fmt: skip
        self.student_head = PrototypeHead(encoder.embed_dim, config.num_prototypes)
        self.clustering = ClusteringHead(encoder.embed_dim, config.num_prototypes)
        # In a tuple it is no part of this module: nobody trains it, saves it or casts it with the others.
        self._teacher = (copy.deepcopy(encoder).requires_grad_(False).eval(),)
        self.coins = place_drop_path(self, seed)

    @property
    def teacher(self) -> VisionTransformer:
        return self._teacher[0]

    def forward(self, batch: Batch) -> Outcome:
        self.coins.toss(batch.positions)
        mask, predicted = self.mask(batch.positions)
        scores, assignments = self.cluster(batch.images)
        clustering_losses = soft_cross_entropy(scores, assignments, self.config.clustering_temperature).mean(dim=1)
        targets = assignments.gather(1, predicted.unsqueeze(-1).expand(-1, -1, assignments.shape[-1]))  # (B, M, P)
        predictions = self.predict(batch.images, mask, predicted)
        prediction_losses = soft_cross_entropy(predictions, targets, self.config.student_temperature).mean(dim=1)
        losses = prediction_losses + clustering_losses  # (B,)
        parts = {"prediction_loss": prediction_losses, "clustering_loss": clustering_losses}
        sums = {name: part.detach().sum() for name, part in parts.items() if self.training}  # evaluation may pad
        return Outcome(losses.mean(), sums, losses.detach())

    def mask(self, positions: Tensor) -> tuple[PatchMask, Tensor]:
        """What the student does not see, and (B, M) int64: the patches of it that it predicts."""
        mask = inverse_block_mask(positions, self.grid, self.config.mask_ratio, self.seed)
        count = self.config.num_predicted(self.grid[0] * self.grid[1])
        return mask, choose_masked(mask, count, positions, self.seed)

    def cluster(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, P) each, float32: the clustering head's scores of the teacher's latents, and their assignments."""
        with torch.no_grad():
            latents = encode_embedded(self.teacher, self.teacher.patch_embed(images))[:, self.prefix :]
        scores = self.clustering(latents).float()
        temperature, iterations = self.config.target_temperature, self.config.sinkhorn_iterations
        return scores, balanced_assignments(scores.detach() / temperature, iterations)

    def predict(self, images: Tensor, mask: PatchMask, predicted: Tensor) -> Tensor:
        """(B, M, P): the student's scores of the patches `predicted`, of which it sees none."""
        tokens = encode_visible(self.encoder, images, mask.visible)
        return self.student_head(self.predictor(tokens, mask.visible, predicted))

    def place_teacher(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Make the teacher what the encoder is now; its tensors by the names of the encoder's parameters."""
        self.teacher.load_state_dict(self.encoder.state_dict())
        self.teacher.to(device, dtype)
        return {f"encoder.{name}": tensor.detach() for name, tensor in self.teacher.named_parameters()}

    def teacher_momentum(self, progress: Progress) -> float:
        """What the teacher keeps of itself in a step: from 1 down over the warm-up, then up to nearly 1 again."""
        most = 1 - self.config.teacher_momentum
        if progress.warmed_up < 1:
            return 1 - most * progress.warmed_up
        turn = math.pi * self.config.momentum_cosine_share * progress.after_warmup
        return 1 - most * 0.5 * (1 + math.cos(turn))

    def optimizer_factors(self, name: str) -> Factors:
        """The clustering head's own optimizer, and the paper's patch embedding and norms, as factors of one."""
        if name.startswith("clustering."):
            return Factors(self.config.clustering_learning_rate, self.config.clustering_weight_decay)
        if name.startswith("encoder.patch_embed."):
            return Factors(self.config.patch_embedding_learning_rate)
        if "norm" in name and name.endswith("weight"):
            return Factors(weight_decay=self.config.norm_weight_decay)
        return Factors()
