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


def write_cola(folder: Path, rng: np.random.Generator, n: int = 12, m: int = 6) -> None:
    """Tab-separated sentences, those of label 0 with their words in a wrong order; and a BERT-base of random weights.

    Writes 440 MB, as large as the real one.
    """
    write_sentences(folder, rng, n, m)
    write_bert(folder / "bert-base-uncased")


def write_sentences(folder: Path, rng: np.random.Generator, n: int, m: int) -> None:
    """The two tables of CoLA."""
    for name, count in (("in_domain_train.tsv", n), ("in_domain_dev.tsv", m)):
        lines = []
        for i in range(count):
            chosen = [rng.choice(kind) for kind in (_WORDS[2:5], _WORDS[5:8], _WORDS[2:5])]
            words = ["the", chosen[0], chosen[1], "a", chosen[2]]
            label = i % 2
            lines.append(f"gen\t{label}\t{'' if label else '*'}\t{' '.join(words if label else words[::-1])} .")
        (folder / name).write_text("\n".join(lines) + "\n")


def write_bert(folder: Path, **sizes: int) -> None:
    """A BERT as transformers saves it: the configuration and the vocabulary's length of bert-base-uncased.

    Args:
        folder: to make.
        sizes: fields of `BertConfig` that differ from BERT-base.
    """
    from transformers import BertConfig, BertModel

    folder.mkdir()
    config = BertConfig(**sizes)
    # As in the real file: padding first, unused places, the special tokens from place 100 on, then words.
    vocabulary = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *_WORDS]
    vocabulary += [f"[unused{i}]" for i in range(99, 99 + config.vocab_size - len(vocabulary))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertModel(config).save_pretrained(folder)


def _idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))
