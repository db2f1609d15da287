"""A plain ViT as transformers has it: config.json, model.safetensors and, where one says the same, an image processor.

Its ViT reads the class token. A head that reads the mean of the patches, with its norm behind the mean, and branches
with factors (LayerScale) are found in its BEiT, whose keys have no bias: one adds the same to all of a query's scores,
so that the softmax does not see it, and is left out. The files' names of tensors are those of transformers before 5,
which the newer ones read, too.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.encoders.config import EncoderConfig
from models.weights.foreign import from_timm
from models.weights.layouts import HUGGING_FACE
from pipeline.evaluation.features import evaluation_input_of
from pipeline.exporting.expressible import transformers_word
from pipeline.registry.locate import ModelSource
from pipeline.shards.atomic import give_usual_rights

BICUBIC = 3  # PIL's number


def write_hugging_face(network: nn.Module, source: ModelSource, folder: Path) -> str | None:
    """The directory, of a network whose positions are a table; in words what it does not say of the images, if any."""
    encoder = EncoderConfig.model_validate(source.encoder)
    (folder / "config.json").write_text(json.dumps(_config(source, encoder), indent=2) + "\n")
    renamed = _renamed(network.state_dict(), encoder)
    if source.num_classes:
        word = transformers_word(encoder)
        renamed = {name if name.startswith("classifier.") else f"{word}.{name}": one for name, one in renamed.items()}
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, file, metadata={"format": "pt"})
    give_usual_rights(file)
    processor, lacking = image_processor(source)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return lacking


def _renamed(state: dict[str, Tensor], encoder: EncoderConfig) -> dict[str, Tensor]:
    """The tensors under transformers' names, without the model's prefix."""
    if "pos_embed" not in state:
        state["pos_embed"] = torch.zeros(1, encoder.num_prefix_tokens + encoder.num_patches, encoder.embed_dim)
    beit = transformers_word(encoder) == "beit"
    if beit and not encoder.qkv_bias:  # BEiT's queries and values have one always
        zeros = torch.zeros(3 * encoder.embed_dim)
        state |= {f"blocks.{block}.attn.qkv.bias": zeros for block in range(encoder.depth)}
    own = {name: their for name in state if (their := _of_beit_alone(name)) is not None}
    renamed = from_timm({name: tensor for name, tensor in state.items() if name not in own}, HUGGING_FACE)
    renamed |= {their: state[name] for name, their in own.items()}
    return {name: tensor for name, tensor in renamed.items() if not (beit and name.endswith("attention.key.bias"))}


def _of_beit_alone(name: str) -> str | None:
    """BEiT's name of one of timm's tensors that transformers' ViT has no place for."""
    if factor := re.fullmatch(r"blocks\.(\d+)\.ls([12])\.gamma", name):
        return f"encoder.layer.{factor[1]}.lambda_{factor[2]}"
    return f"pooler.layernorm.{name.removeprefix('fc_norm.')}" if name.startswith("fc_norm.") else None


def _config(source: ModelSource, encoder: EncoderConfig) -> dict[str, Any]:
    height, width = encoder.input_size
    word = transformers_word(encoder)
    kind = {"vit": "ViT", "beit": "Beit"}[word] + ("ForImageClassification" if source.num_classes else "Model")
    config = {
        "architectures": [kind], "model_type": word,
        "hidden_size": encoder.embed_dim, "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads, "intermediate_size": encoder.mlp_dim,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[encoder.activation],
        "layer_norm_eps": encoder.norm_eps, "qkv_bias": encoder.qkv_bias,
        "image_size": height if height == width else [height, width], "patch_size": encoder.patch_size,
        "num_channels": encoder.channels, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }  # fmt: skip
    if word == "beit":
        config |= {
            "use_mean_pooling": encoder.pooling == "mean", "layer_scale_init_value": encoder.layer_scale or 0.0,
            "use_absolute_position_embeddings": True, "use_relative_position_bias": False,
            "use_shared_relative_position_bias": False, "use_mask_token": False, "drop_path_rate": 0.0,
        }  # fmt: skip
    if source.num_classes:
        names = source.classes or [f"LABEL_{number}" for number in range(source.num_classes)]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
        config["problem_type"] = (
            "multi_label_classification" if source.outputs == "sigmoid" else "single_label_classification"
        )
    return config


def image_processor(source: ModelSource) -> tuple[dict[str, Any] | None, str | None]:
    """A preprocessor_config.json whose pixels (with `backend="pil"`) are those that the model was scored on; None, and
    why, where transformers' processors do something else."""
    inputs = evaluation_input_of(source)
    height, width = inputs.size
    if inputs.channels != 3:
        words = f"transformers' processors are of 3 channels, this is of {inputs.channels}"
        return None, f"no preprocessor_config.json: {words}"
    frame = [math.floor(side / inputs.crop) for side in inputs.size]
    if inputs.crop_mode == "center" and height == width:
        size = {"shortest_edge": frame[0]}
    elif inputs.crop_mode == "squash":
        size = {"height": frame[0], "width": frame[1]}
    else:
        return None, (
            "no preprocessor_config.json: transformers' processors do not resize as crop mode "
            f"{inputs.crop_mode} of {height} x {width} does"
        )
    return {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": size,
        "resample": BICUBIC, "do_center_crop": True, "crop_size": {"height": height, "width": width},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(source.mean), "image_std": list(source.std),
    }, None  # fmt: skip
