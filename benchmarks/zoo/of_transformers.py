"""Classifiers of transformers from small configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .entry import CLASSES, Entry, images, tokens

VOCABULARY = 100
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3}


def build(model: str, config: str, **options: Any) -> nn.Module:
    """A model from the names of its class and of its configuration's."""
    import transformers

    # Eager attention and experts: the same for every length, mask and dtype, float64 included.
    settings = getattr(transformers, config)(num_labels=CLASSES, attn_implementation="eager", **options)
    return getattr(transformers, model)(settings)


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """What the model calls its logits; at least float32."""
    found = (model(**inputs) if isinstance(inputs, dict) else model(inputs)).logits
    return found.to(torch.promote_types(found.dtype, torch.float32))


def words(n: int, vocabulary: int = VOCABULARY, end: int | None = None, mask: bool = True) -> dict[str, Tensor]:
    """Sequences of twelve tokens, all to be seen."""
    ids = tokens(n, 12, vocabulary)
    if end is not None:
        ids[:, -1] = end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if mask else {"input_ids": ids}


class _WithHead(nn.Module):
    """A model that has no classifier of its own: the mean of its last states, through a linear layer."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(input_ids).last_hidden_state.mean(1))


def _bare(model: str, config: str, width: int = 32, **options: Any) -> nn.Module:
    return _WithHead(build(model, config, **options), width)


def _text(name: str, stem: str, inputs: Callable[[int], Any] = words, **options: Any) -> Entry:
    make = partial(build, f"{stem}ForSequenceClassification", f"{stem}Config", **TEXT | options)
    return Entry(name, "transformers", make, inputs, logits)


def _image(name: str, stem: str, size: int = 32, **options: Any) -> Entry:
    make = partial(build, f"{stem}ForImageClassification", f"{stem}Config", **options)
    return Entry(name, "transformers", make, partial(images, size=size), logits)


def _audio(name: str, stem: str, **options: Any) -> Entry:
    convolutions = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    make = partial(
        build,
        f"{stem}ForSequenceClassification",
        f"{stem}Config",
        **WIDTH | convolutions | positions | {"num_feat_extract_layers": 3, "classifier_proj_size": 32} | options,
    )
    return Entry(name, "transformers", make, lambda n: torch.randn(n, 800), logits)


def _state_space(name: str, stem: str, **options: Any) -> Entry:
    make = partial(_bare, f"{stem}Model", f"{stem}Config", **TEXT | options)
    return Entry(name, "transformers", make, tokens, lambda model, x: model(x))


def half(entry: Entry, dtype: torch.dtype) -> Entry:
    """The same with weights of half precision, its logits float32."""
    word = str(dtype).removeprefix("torch.")
    return Entry(f"{entry.name}, {word}", entry.source, entry.build, entry.inputs, entry.forward, dtype)


GROUPED = WIDTH | {"num_key_value_heads": 1, "head_dim": 16}
BERT = _text("BERT", "Bert", **WIDTH)
LLAMA = _text("Llama", "Llama", **GROUPED)
VIT = _image("ViT", "ViT", **WIDTH | IMAGE)

ENTRIES = (
    BERT,
    half(BERT, torch.bfloat16),
    half(BERT, torch.float16),
    _text("RoBERTa", "Roberta", max_position_embeddings=40, **WIDTH),
    _text("XLM-RoBERTa", "XLMRoberta", max_position_embeddings=40, **WIDTH),
    _text("CamemBERT", "Camembert", max_position_embeddings=40, **WIDTH),
    _text("DistilBERT", "DistilBert", dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    _text("ALBERT", "Albert", embedding_size=16, **WIDTH),
    _text("DeBERTa-v2", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], **WIDTH),
    _text("DeBERTa", "Deberta", relative_attention=True, pos_att_type=["p2c", "c2p"], **WIDTH),
    _text("Electra", "Electra", embedding_size=16, **WIDTH),
    _text("MPNet", "MPNet", max_position_embeddings=40, **WIDTH),
    _text("MobileBERT", "MobileBert", embedding_size=16, intra_bottleneck_size=32, **WIDTH),
    _text("SqueezeBERT", "SqueezeBert", embedding_size=32, **WIDTH),
    _text("ConvBERT", "ConvBert", embedding_size=32, conv_kernel_size=3, **WIDTH),
    _text("RoFormer", "RoFormer", embedding_size=32, **WIDTH),
    _text("FNet", "FNet", inputs=partial(words, mask=False), **WIDTH),
    _text("I-BERT", "IBert", max_position_embeddings=40, **WIDTH),
    _text("LayoutLM", "LayoutLM", **WIDTH),
    _text("ModernBERT", "ModernBert", reference_compile=False, cls_token_id=1, sep_token_id=2, **WIDTH),
    _text("Funnel", "Funnel", block_sizes=[1, 1], d_model=32, n_head=2, d_head=16, d_inner=64),
    _text("Longformer", "Longformer", attention_window=4, max_position_embeddings=40, **WIDTH),
    _text("BigBird", "BigBird", attention_type="original_full", **WIDTH),
    _text("XLNet", "XLNet", d_model=32, n_layer=2, n_head=2, d_inner=64),
    _text("XLM", "XLM", emb_dim=32, n_layers=2, n_heads=2),
    _text("GPT-2", "GPT2", n_embd=32, n_layer=2, n_head=2),
    half(_text("GPT-2", "GPT2", n_embd=32, n_layer=2, n_head=2), torch.bfloat16),
    _text("GPT", "OpenAIGPT", n_embd=32, n_layer=2, n_head=2),
    _text("GPT-Neo", "GPTNeo", hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]),
    _text("GPT-NeoX", "GPTNeoX", **WIDTH),
    _text("GPT-J", "GPTJ", n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
    LLAMA,
    half(LLAMA, torch.bfloat16),
    _text("Mistral", "Mistral", **GROUPED),
    _text("Mixtral", "Mixtral", num_local_experts=3, experts_implementation="eager", **GROUPED),
    _text("Qwen2", "Qwen2", **WIDTH | {"num_key_value_heads": 1}),
    _text("Qwen3", "Qwen3", **GROUPED),
    _text("Gemma", "Gemma", **GROUPED),
    _text("Gemma 2", "Gemma2", **GROUPED),
    _text("Phi-3", "Phi3", **WIDTH | {"num_key_value_heads": 1}),
    _text("StableLM", "StableLm", **WIDTH | {"num_key_value_heads": 1}),
    _text("OPT", "OPT", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32),
    _text("BLOOM", "Bloom", hidden_size=32, n_layer=2, n_head=2),
    _text("Falcon", "Falcon", **WIDTH),
    _text("MPT", "Mpt", d_model=32, n_heads=2, n_layers=2, max_seq_len=32),
    _text(
        "T5",
        "T5",
        inputs=partial(words, end=2),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    ),
    Entry(
        "T5 encoder",
        "transformers",
        partial(_bare, "T5EncoderModel", "T5Config", d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, **TEXT),
        tokens,
        lambda model, x: model(x),
    ),
    _text(
        "BART",
        "Bart",
        inputs=partial(words, end=2),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        forced_eos_token_id=2,
    ),
    _state_space("Mamba", "Mamba", hidden_size=32, state_size=8, num_hidden_layers=2),
    _state_space(
        "Mamba 2",
        "Mamba2",
        hidden_size=32,
        state_size=8,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=4,
    ),
    _state_space("RWKV", "Rwkv", hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, use_cache=False),
    VIT,
    half(VIT, torch.bfloat16),
    _image("DeiT", "DeiT", **WIDTH | IMAGE),
    _image("BEiT", "Beit", use_relative_position_bias=True, **WIDTH | IMAGE),
    _image("Data2VecVision", "Data2VecVision", use_shared_relative_position_bias=True, **WIDTH | IMAGE),
    _image("DINOv2", "Dinov2", mlp_ratio=2, **WIDTH | IMAGE),
    _image("Swin", "Swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    _image(
        "Swin v2", "Swinv2", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    _image("ConvNeXt", "ConvNext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    _image("ConvNeXt v2", "ConvNextV2", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    _image("ResNet", "ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
    _image("RegNet", "RegNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8),
    _image("MobileNetV1", "MobileNetV1", depth_multiplier=0.25),
    _image("MobileNetV2", "MobileNetV2", depth_multiplier=0.25),
    _image("EfficientNet", "EfficientNet", width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640),
    _image(
        "FocalNet",
        "FocalNet",
        image_size=32,
        embed_dim=16,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        use_layerscale=True,
        hidden_sizes=[16, 32],
    ),
    _image(
        "SegFormer",
        "Segformer",
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        num_encoder_blocks=2,
        strides=[4, 2],
        patch_sizes=[7, 3],
        mlp_ratios=[2, 2],
    ),
    _image(
        "PVT",
        "Pvt",
        image_size=32,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_attention_heads=[1, 2],
        sequence_reduction_ratios=[2, 1],
        num_encoder_blocks=2,
        strides=[4, 2],
        patch_sizes=[4, 2],
        mlp_ratios=[2, 2],
    ),
    _image(
        "PoolFormer",
        "PoolFormer",
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_encoder_blocks=2,
        strides=[4, 2],
        patch_sizes=[7, 3],
        padding=[2, 1],
    ),
    _image(
        "LeViT",
        "Levit",
        size=32,
        image_size=32,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[1, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
    ),
    _image("CvT", "Cvt", embed_dim=[16, 24, 32], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    _image(
        "MobileViT",
        "MobileViT",
        image_size=32,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 16, 16, 16, 16, 16, 32],
        num_attention_heads=2,
        size=32,
    ),
    _image("MobileViT v2", "MobileViTV2", size=64, image_size=64, width_multiplier=0.25),
    _image(
        "BiT", "Bit", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="preactivation", num_groups=4
    ),
    _audio("Wav2Vec2", "Wav2Vec2"),
    _audio("HuBERT", "Hubert"),
    _audio("WavLM", "WavLM"),
    Entry(
        "Audio spectrogram transformer",
        "transformers",
        partial(
            build,
            "ASTForAudioClassification",
            "ASTConfig",
            max_length=24,
            num_mel_bins=16,
            patch_size=8,
            frequency_stride=4,
            time_stride=4,
            **WIDTH,
        ),
        lambda n: torch.randn(n, 24, 16),
        logits,
    ),
)
