"""Forward parity with independent implementations of the ViT, float32, at random weights: logits and every block."""

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
from vit_pytorch import ViT

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.encoders.vit import Encoder, build_encoder
from models.masked.decoder_config import DecoderConfig
from models.masked.masking import random_patch_mask
from models.objectives.batch import Batch
from models.objectives.config import MaskedAutoencoderConfig
from models.weights.foreign import from_timm
from models.weights.layouts import HUGGING_FACE, TORCHVISION, VIT_PYTORCH
from models.weights.loading import WeightsError, load_encoder_weights
from pipeline.registry.locate import locate_model
from pipeline.registry.weights import load_model, source_weights

CLASSES = 7
TOLERANCE = 1e-5
HF = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192, "image_size": 32,
    "patch_size": 8, "hidden_act": "gelu",
}  # fmt: skip
OURS = {
    "name": "vit_ti8", "image_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(module: nn.Module) -> nn.Module:
    """Every trained parameter drawn anew, so that none is zero, one, or the same in both by its initialisation.

    Matrices keep the size of what passes them: float32's rounding grows with it.
    """
    with torch.no_grad():
        for parameter in (parameter for parameter in module.parameters() if parameter.requires_grad):
            one = parameter.ndim == 1 and bool((parameter == 1).all())  # a norm's factor
            std = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.1
            nn.init.normal_(parameter, mean=float(one), std=std)
    return module.eval()


def with_weights_of(theirs: nn.Module, num_classes: int = CLASSES, **options) -> Encoder:
    encoder = build_encoder(EncoderConfig(**OURS | options), num_classes).eval()
    report = load_encoder_weights(encoder, theirs.state_dict(), head=True)
    assert not report.missing and not report.unexpected and not report.resized and not report.notes
    assert len(report.loaded) == len(encoder.state_dict())
    return encoder


def images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


def block_outputs(module: nn.Module, blocks, inputs: Tensor) -> list[Tensor]:
    """What each block gives for `inputs`; a library may wrap it in a tuple."""
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        module(inputs)
    return seen


def assert_equal(ours: nn.Module, theirs: nn.Module, their_blocks, their_output, inputs: Tensor) -> None:
    """Logits and every block's output within the tolerance."""
    with torch.no_grad():
        expected, found = their_output(inputs), ours(inputs)
    pairs = list(
        zip(block_outputs(ours, ours.blocks, inputs), block_outputs(theirs, their_blocks, inputs), strict=True)
    )
    assert len(pairs) == len(ours.blocks)
    assert expected.std() > 0.05  # parity of zeros would prove nothing
    for mine, other in [*pairs, (found, expected)]:
        assert mine.shape == other.shape and (mine - other).abs().max() < TOLERANCE


@pytest.mark.parametrize("activation", [{}, {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False}], ids=str)
def test_parity_with_hugging_face_without_pooler(activation):
    theirs = randomised(ViTForImageClassification(ViTConfig(**HF | activation, num_labels=CLASSES)))
    options = {"activation": "gelu_tanh", "qkv_bias": False} if activation else {}
    ours = with_weights_of(theirs, norm_eps=1e-12, **options)
    assert_equal(ours, theirs, theirs.vit.layers, lambda x: theirs(x).logits, images())


def test_parity_with_hugging_face_with_pooler():
    theirs = randomised(ViTModel(ViTConfig(**HF)))
    ours = with_weights_of(theirs, num_classes=0, norm_eps=1e-12, representation=True)
    assert_equal(ours, theirs, theirs.layers, lambda x: theirs(x).pooler_output, images())


@pytest.mark.parametrize(("name", "width", "heads"), [("vit_b_16", 768, 12), ("vit_l_16", 1024, 16)])
def test_parity_with_torchvision(name, width, heads):
    """Its own functions, which set everything but these: no more than two of their blocks."""
    theirs = getattr(torchvision.models, name)(num_classes=CLASSES, image_size=32)
    theirs.encoder.layers = theirs.encoder.layers[:2]
    theirs = randomised(theirs)
    ours = with_weights_of(
        theirs, patch_size=16, embed_dim=width, num_heads=heads, depth=2, mlp_ratio=4.0, norm_eps=1e-6
    )
    assert_equal(ours, theirs, theirs.encoder.layers, theirs, images())


def test_parity_with_torchvision_with_a_representation():
    theirs = torchvision.models.VisionTransformer(32, 8, 3, 3, 96, 192, num_classes=CLASSES, representation_size=96)
    ours = with_weights_of(randomised(theirs), norm_eps=1e-6, representation=True)
    assert_equal(ours, theirs, theirs.encoder.layers, theirs, images())


class BlockOfVitPytorch(nn.Module):
    """vit-pytorch keeps a block's halves in a list and adds the residuals in a loop; here they are one module."""

    def __init__(self, halves: nn.ModuleList):
        super().__init__()
        self.halves = halves

    def forward(self, tokens: Tensor) -> Tensor:
        for half in self.halves:
            tokens = half(tokens) + tokens
        return tokens


def vit_pytorch(channels: int = 3, **options) -> ViT:
    return ViT(**{
        "image_size": 32, "patch_size": 8, "num_classes": CLASSES, "dim": 96, "depth": 3, "heads": 3, "dim_head": 32,
        "mlp_dim": 192, "channels": channels,
    } | options)  # fmt: skip


def plain_vit_pytorch(channels: int = 3) -> ViT:
    """Without the norms around the patch embedding, as its layout once was."""
    theirs = vit_pytorch(channels)
    theirs.to_patch_embedding = nn.Sequential(theirs.to_patch_embedding[0], theirs.to_patch_embedding[2])
    return randomised(theirs)


@pytest.mark.parametrize("channels", [3, 4])
def test_parity_with_vit_pytorch(channels):
    theirs = plain_vit_pytorch(channels)
    ours = with_weights_of(theirs, norm_eps=1e-5, qkv_bias=False, channels=channels)
    inputs, tokens, expected = images(channels=channels), [], None
    theirs.transformer.layers[0][0].register_forward_pre_hook(lambda _, given: tokens.append(given[0]))
    with torch.no_grad():
        expected = theirs(inputs)
        for halves in theirs.transformer.layers:
            tokens.append(BlockOfVitPytorch(halves)(tokens[-1]))
        assert (ours(inputs) - expected).abs().max() < TOLERANCE and expected.std() > 0.05
        for mine, other in zip(block_outputs(ours, ours.blocks, inputs), tokens[-3:], strict=True):
            assert (mine - other).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "normalises the pixels of a patch"),
        ({"dim_head": 64}, "heads \\* dim_head is 192 and dim is 96"),
        ({"heads": 1, "dim_head": 96}, "no to_out"),
        ({"pool": "mean"}, "its norm before the mean"),
    ],
)
def test_what_vit_pytorch_has_and_timm_does_not_is_refused_with_the_reason(options, words):
    theirs = vit_pytorch(**options)
    if options:
        theirs.to_patch_embedding = nn.Sequential(theirs.to_patch_embedding[0], theirs.to_patch_embedding[2])
    with pytest.raises(WeightsError, match=words):
        load_encoder_weights(build_encoder(EncoderConfig(**OURS, qkv_bias=False)), theirs.state_dict(), head=False)


@pytest.mark.parametrize(
    ("layout", "theirs", "options"),
    [
        (HUGGING_FACE, lambda: ViTForImageClassification(ViTConfig(**HF, num_labels=CLASSES)), {"norm_eps": 1e-12}),
        (TORCHVISION, lambda: torchvision.models.VisionTransformer(32, 8, 3, 3, 96, 192, num_classes=CLASSES), {}),
        (VIT_PYTORCH, plain_vit_pytorch, {"norm_eps": 1e-5, "qkv_bias": False}),
    ],
    ids=["Hugging Face", "torchvision", "vit-pytorch"],
)
def test_parity_of_our_weights_in_another_library(tmp_path, layout, theirs, options):
    """The other direction: what we trained, read by theirs."""
    ours = randomised(build_encoder(EncoderConfig(**OURS | options), CLASSES))
    theirs, weights, inputs = theirs().eval(), from_timm(ours.state_dict(), layout), images()
    if layout is HUGGING_FACE:
        weights = {name if name.startswith("classifier") else f"vit.{name}": t for name, t in weights.items()}
        theirs = ViTForImageClassification.from_pretrained(None, config=theirs.config, state_dict=weights).eval()
    else:
        theirs.load_state_dict(weights)
    with torch.no_grad():
        expected = theirs(inputs)
        assert (ours(inputs) - getattr(expected, "logits", expected)).abs().max() < TOLERANCE


def google_arrays(encoder: Encoder, heads: int) -> dict[str, np.ndarray]:
    """The encoder's weights as google-research/vision_transformer names and shapes them."""
    w = {name: tensor.detach().numpy() for name, tensor in encoder.state_dict().items()}
    width = encoder.embed_dim
    arrays = {
        "cls": w["cls_token"], "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"], "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"], "head/kernel": w["head.weight"].T, "head/bias": w["head.bias"],
    }  # fmt: skip
    if "head_drop.fc.weight" in w:
        arrays |= {"pre_logits/kernel": w["head_drop.fc.weight"].T, "pre_logits/bias": w["head_drop.fc.bias"]}
    for i in range(len(encoder.blocks)):
        block, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        kernels = w[block + "attn.qkv.weight"].reshape(3, heads, width // heads, width)
        biases = w[block + "attn.qkv.bias"].reshape(3, heads, width // heads)
        for part, word in enumerate(("query", "key", "value")):
            arrays[f"{theirs}MultiHeadDotProductAttention_1/{word}/kernel"] = kernels[part].transpose(2, 0, 1)
            arrays[f"{theirs}MultiHeadDotProductAttention_1/{word}/bias"] = biases[part]
        out = w[block + "attn.proj.weight"].T.reshape(heads, width // heads, width)
        arrays[f"{theirs}MultiHeadDotProductAttention_1/out/kernel"] = out
        arrays[f"{theirs}MultiHeadDotProductAttention_1/out/bias"] = w[block + "attn.proj.bias"]
        for number, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = w[f"{block}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = w[f"{block}{norm}.bias"]
        for number, layer in ((0, "fc1"), (1, "fc2")):
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/kernel"] = w[f"{block}mlp.{layer}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/bias"] = w[f"{block}mlp.{layer}.bias"]
    return arrays


@pytest.mark.parametrize("representation", [False, True])
def test_parity_with_a_file_of_googles_through_timms_loader(tmp_path, representation):
    config = EncoderConfig(**OURS, representation=representation)
    original = randomised(build_encoder(config, CLASSES))
    np.savez(tmp_path / "vit.npz", **google_arrays(original, 3))
    source = locate_model(str(tmp_path / "vit.npz"), tracking_uri="", home=tmp_path)
    assert EncoderConfig.model_validate(source.encoder).model_dump(exclude={"name"}) == config.model_dump(
        exclude={"name"}
    )
    assert (source.num_classes, source.mean) == (CLASSES, (0.5, 0.5, 0.5))
    ours = load_model(source)
    assert_equal(ours, original, original.blocks, original, images())


def test_parity_with_a_directory_of_hugging_faces(tmp_path):
    theirs = randomised(ViTForImageClassification(ViTConfig(**HF, num_labels=CLASSES)))
    theirs.save_pretrained(tmp_path / "hf")
    source = locate_model(f"hf:{tmp_path / 'hf'}", tracking_uri="", home=tmp_path)
    assert source.encoder["norm_eps"] == 1e-12 and source.num_classes == CLASSES
    assert_equal(load_model(source), theirs, theirs.vit.layers, lambda x: theirs(x).logits, images())
    assert "classifier.weight" in source_weights(source)


MAE = MaskedAutoencoderConfig(decoder=DecoderConfig(embed_dim=64, depth=2, num_heads=4))
HF_MAE = HF | {
    "decoder_hidden_size": 64, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 256, "mask_ratio": 0.75, "norm_pix_loss": True, "layer_norm_eps": 1e-6,
}  # fmt: skip
DECODER = {
    "embed": "decoder_embed", "mask_token": "mask_token", "pos_embed": "decoder_pos_embed", "norm": "decoder_norm",
    "predict": "decoder_pred",
}  # fmt: skip


def hugging_face_mae(ours: nn.Module) -> ViTMAEForPreTraining:
    """Theirs with our weights; a decoder's block has an encoder's names."""
    weights = {f"vit.{name}": t for name, t in from_timm(ours.encoder.state_dict(), HUGGING_FACE).items()}
    own = ours.decoder.state_dict()
    blocks = from_timm({name: t for name, t in own.items() if name.startswith("blocks.")}, HUGGING_FACE)
    weights |= {name.replace("encoder.layer.", "decoder.decoder_layers."): t for name, t in blocks.items()}
    for name, tensor in own.items():
        module, _, suffix = name.partition(".")
        if module in DECODER:
            weights[f"decoder.{DECODER[module]}" + (f".{suffix}" if suffix else "")] = tensor
    theirs = ViTMAEForPreTraining.from_pretrained(None, config=ViTMAEConfig(**HF_MAE), state_dict=weights)
    return theirs.eval()


def test_parity_of_the_masked_autoencoder_with_hugging_faces():
    """Same weights, same hidden patches: loss and reconstruction to 1e-5, gradients to 1e-4."""
    ours = build_objective(MAE, EncoderConfig(**OURS, positions="sincos2d"), num_classes=0, seed=0)
    randomised(ours)
    theirs = hugging_face_mae(ours)
    inputs, positions = images(), torch.arange(2)
    outcome = ours(Batch(inputs, torch.zeros(2, dtype=torch.int64), positions))
    mask = random_patch_mask(positions, 16, MAE.mask_ratio, seed=0)
    noise = mask.masked.float() + torch.rand(2, 16) / 2  # theirs keeps the patches of least noise
    expected = theirs(inputs, noise=noise)
    assert torch.equal(expected.mask.bool(), mask.masked)
    assert outcome.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert (ours.predict(inputs, mask) - expected.logits).abs().max() < 1e-5
    outcome.loss.backward()
    expected.loss.backward()
    for mine, other in [
        (ours.encoder.patch_embed.proj, theirs.vit.embeddings.patch_embeddings.projection),
        (ours.encoder.blocks[0].mlp.fc1, theirs.vit.layers[0].mlp.fc1),
        (ours.encoder.blocks[2].attn.proj, theirs.vit.layers[2].attention.o_proj),
        (ours.encoder.norm, theirs.vit.layernorm),
        (ours.decoder.embed, theirs.decoder.decoder_embed),
        (ours.decoder.blocks[1].mlp.fc2, theirs.decoder.decoder_layers[1].mlp.fc2),
        (ours.decoder.predict, theirs.decoder.decoder_pred),
    ]:
        assert (mine.weight.grad - other.weight.grad).abs().max() < 1e-4 and mine.weight.grad.abs().max() > 1e-3
        assert (mine.bias.grad - other.bias.grad).abs().max() < 1e-4
