"""Small generated files in exactly the formats of the real data sets, for `--smoke`."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np

_WORDS = ("the", "a", "cat", "dog", "bird", "sees", "likes", "hears", "runs", "small", "old", "quickly")


def write_mnist(folder: Path, rng: np.random.Generator, n: int = 60, m: int = 30) -> None:
    """Gzipped idx files of 28 × 28 images: a bright bar whose place depends on the class, and noise."""
    for name, count in (("train", n), ("t10k", m)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 80, (count, 28, 28))
        for i, label in enumerate(labels):
            images[i, 4 + 12 * label : 10 + 12 * label, 4:24] += 150
        _idx(folder / f"{name}-images-idx3-ubyte.gz", images.astype(np.uint8))
        _idx(folder / f"{name}-labels-idx1-ubyte.gz", labels.astype(np.uint8))


def write_cifar10(folder: Path, rng: np.random.Generator, n: int = 12, m: int = 30) -> None:
    """Pickled batches: dictionaries of `data` uint8 [n, 3072] and `labels`; each class has a colour and a place."""
    colours = rng.integers(100, 200, (10, 3))
    for b, (name, count) in enumerate([*((f"data_batch_{i}", n) for i in range(1, 6)), ("test_batch", m)]):
        labels = rng.permutation((np.arange(count) + b * n) % 10)
        images = rng.integers(0, 60, (count, 3, 32, 32))
        for i, label in enumerate(labels):
            images[i, :, 3 * label : 3 * label + 3, 4:28] += colours[label][:, None, None] // 2
        content = {b"data": images.astype(np.uint8).reshape(count, -1), b"labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_cola(folder: Path, rng: np.random.Generator, n: int = 60, m: int = 30) -> None:
    """Tab-separated sentences, those of label 0 with their words in a wrong order; and a very small BERT."""
    for name, count in (("in_domain_train.tsv", n), ("in_domain_dev.tsv", m)):
        lines = []
        for i in range(count):
            words = [
                _WORDS[0],
                *rng.choice(_WORDS[2:5], 1),
                *rng.choice(_WORDS[5:8], 1),
                "a",
                *rng.choice(_WORDS[2:5], 1),
            ]
            label = i % 2
            lines.append(f"gen\t{label}\t{'' if label else '*'}\t{' '.join(words if label else words[::-1])} .")
        (folder / name).write_text("\n".join(lines) + "\n")
    write_bert(folder / "bert-base-uncased")


def write_bert(folder: Path) -> None:
    """A BERT of two layers and a vocabulary of a dozen words, as transformers saves them."""
    from transformers import BertConfig, BertModel

    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *_WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)


def _idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))
