"""Memory of a rank, counted before anything is allocated. Pure, torch-free."""

from models.config import EncoderConfig, MaskedAutoencoderConfig, ObjectiveConfig
from pipeline.config.deepspeed import REDUCE_BUCKET_ELEMENTS

GATHERED_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: so many stay whole until they are updated


def state_bytes(parameters: int, stage: int, world_size: int, precision: str, ema: bool) -> int:
    """Most bytes per rank of weights, gradients, moments and average, without activations.

    ZeRO's partitions (arXiv:1910.02054, figure 1), and what DeepSpeed 0.19.8 keeps besides: from stage 2 on gradients
    in fp32; at stage 3 a second copy of them, their bucket, and the gathered weights.
    """
    compute = 4 if precision == "fp32" else 2
    moments_and_average = (8 + 4 * ema) * parameters
    if stage == 0:  # autocast keeps copies of the weights in bf16 from forward to backward
        return (8 + (0 if precision == "fp32" else 2)) * parameters + moments_and_average
    owned = (moments_and_average + 4 * parameters) // world_size  # with the fp32 master weights
    weights, whole_gradients, own_gradients = compute * parameters, compute * parameters, 4 * parameters // world_size
    if stage == 1:
        return weights + whole_gradients + owned
    if stage == 2:
        return weights + own_gradients + owned
    bucket, gathered = 4 * REDUCE_BUCKET_ELEMENTS, compute * min(parameters, GATHERED_ELEMENTS)
    return weights // world_size + gathered + 2 * own_gradients + owned + bucket


def activation_bytes(encoder: EncoderConfig, objective: ObjectiveConfig, micro_batch_size: int, precision: str) -> int:
    """Bytes kept for backward: about 34 per token and width in two-byte precision (arXiv:2205.05198, equation 2)."""
    two_bytes = 2 if precision == "fp32" else 1
    tokens = encoder.num_patches + 1
    if not isinstance(objective, MaskedAutoencoderConfig):
        return micro_batch_size * two_bytes * 34 * tokens * encoder.embed_dim * encoder.depth
    visible = encoder.num_patches - int(encoder.num_patches * objective.mask_ratio) + 1
    of_blocks = (
        visible * encoder.embed_dim * encoder.depth + tokens * objective.decoder.embed_dim * objective.decoder.depth
    )
    of_loss = 8 * encoder.num_patches * encoder.patch_size**2 * encoder.channels  # error and its weight, in fp32
    return micro_batch_size * (two_bytes * 34 * of_blocks + of_loss)


def checkpoint_bytes(parameters: int, ema: bool) -> int:
    """Bytes of one checkpoint: fp32 weight and two moments per parameter, and the average."""
    return parameters * (12 + 4 * ema)
