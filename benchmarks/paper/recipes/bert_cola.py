"""BERT-base on CoLA, the acceptability of sentences (needs transformers and a local copy of bert-base-uncased)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import gradstore as gs
from benchmarks.paper.loaders import cola
from benchmarks.paper.recipes.weights import trained_weights
from benchmarks.paper.training import train
from gradstore.errors import ProjectError

LONGEST = 48


class Sentences:
    """Tokenised sentences: `ds[i] -> ({input_ids, attention_mask, token_type_ids}, label)`."""

    def __init__(self, encoded: dict[str, Tensor], labels: Tensor) -> None:
        self.encoded, self.labels = encoded, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], int]:
        return {name: values[i] for name, values in self.encoded.items()}, int(self.labels[i])


def forward(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    """Logits [n, 2]."""
    return model(**x).logits


def project(data: str = "", seed: int = 0, epochs: int = 3) -> gs.Project:
    """AdamW at 2e-5, batches of 32; `data` holds CoLA's tables and the folder `bert-base-uncased`."""
    from transformers import BertForSequenceClassification, BertTokenizer

    folder = Path(data)
    bert = folder / "bert-base-uncased"
    if not bert.is_dir():
        raise ProjectError("there is no BERT", where=bert, hint="Copy config.json, vocab.txt and the weights there")
    tokenizer = BertTokenizer(str(bert / "vocab.txt"))
    splits = {}
    for split in ("train", "test"):
        sentences, labels = cola(folder, split)
        encoded = tokenizer(sentences, padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt")
        splits[split] = Sentences(dict(encoded), labels)

    def build() -> nn.Module:
        return BertForSequenceClassification.from_pretrained(str(bert), num_labels=2, local_files_only=True)

    def make() -> nn.Module:
        adam = lambda p: torch.optim.AdamW(p, 2e-5)  # noqa: E731
        part = splits["train"]
        return train(build, part.encoded, part.labels, seed, forward=forward, optimizer=adam, epochs=epochs, batch=32)

    return gs.Project(
        model=build(),
        weights=trained_weights(folder, "bert_cola", seed, epochs, make),
        splits=splits,
        classes=("unacceptable", "acceptable"),
        forward=forward,
    )
