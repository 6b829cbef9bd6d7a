"""Folders as transformers saves them, of tiny classifiers with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "fast", "##er", "."]
TEXTS = ["the cat sat on the mat .", "a dog ran faster", ("the cat", "a dog"), "the dog sat .", "a cat", "mat mat mat"]
LABELS = [0, 1, 2, 0, 1, -1]


def tiny_bert(folder: Path, classes: int = 3, tokenizer: bool = True, **changes: Any) -> Any:
    """Save a BERT of two layers and, where asked for, its tokenizer; returns the model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        id2label={i: f"kind {i}" for i in range(classes)},
        label2id={f"kind {i}": i for i in range(classes)},
        initializer_range=0.5,
        **changes,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 16}')
    return model


def tiny_vit(folder: Path, processor: bool = True) -> Any:
    """Save a ViT of one layer and, where asked for, what makes 8 × 8 pixels of a picture; returns the model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=2,
        initializer_range=0.5,
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    if processor:
        normal = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "rescale_factor": 1 / 255}
        steps = {"do_resize": True, "resample": 2, "do_rescale": True, "do_normalize": True}
        config = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, **normal, **steps}
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return model
