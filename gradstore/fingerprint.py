"""Identity of a store: what must agree before its rows may be continued, compared or mixed with others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradstore.errors import MismatchError
from gradstore.examples import Examples, input_bytes, sample_rows
from gradstore.parameters import ParameterBlock, parameter_blocks
from gradstore.project import Project
from gradstore.projection import Projection
from gradstore.schema import MEANING
from gradstore.settings import Given, Settings, takes_settings
from gradstore.weights import weights_digest

if TYPE_CHECKING:
    from typing_extensions import Unpack


def identity(
    project: Project,
    examples: Examples,
    blocks: Sequence[ParameterBlock],
    settings: Settings,
    *,
    classes: int,
) -> dict[str, Any]:
    """Everything that decides what the rows of a store are, as nested plain values.

    Not part of it: the text of the project file, batch size, device index, workers, paths and clocks.
    """
    model = model_identity(project, blocks, settings, classes=classes)
    return {**model, "data": data_identity(examples, project.poisoned_mask(examples.split))}


def model_identity(
    project: Project, blocks: Sequence[ParameterBlock], settings: Settings, *, classes: int
) -> dict[str, Any]:
    """The identity without the data; its digest is the fingerprint."""
    chosen = settings.identity()
    return {
        "format": MEANING,
        **chosen,
        "projection": {**chosen["projection"], "version": Projection.VERSION},
        "parameters": {
            "count": sum(block.size for block in blocks),
            "blocks": [[block.name, list(block.shape)] for block in blocks],
        },
        "weights": weights_digest(project.model),
        "precision": str(next(project.model.parameters()).dtype).removeprefix("torch."),
        "classes": classes,
    }


def data_identity(examples: Examples, poisoned: np.ndarray | None = None, n: int | None = None) -> dict[str, Any]:
    """Length, labels, known poison and the bytes of 64 fixed rows, each of which must read the same twice.

    Args:
        examples: the split.
        poisoned: which rows are poisoned, bool [rows], where that is known.
        n: look at the first n rows only, as if the split ended there.

    Raises:
        ProjectError: a row read twice differs.
    """
    n = len(examples) if n is None else n
    rows = sample_rows(n)
    examples.require_repeatable(rows)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(input_bytes(examples.read([int(row)])[0]))
    return {
        "length": n,
        "labels": hashlib.sha256(examples.labels[:n].tobytes()).hexdigest(),
        "poisoned": "not known" if poisoned is None else hashlib.sha256(poisoned[:n].tobytes()).hexdigest(),
        "sampled rows": digest.hexdigest(),
    }


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """128 bits over an identity without its data, as 32 hexadecimal digits."""
    content = {name: value for name, value in identity.items() if name != "data"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@takes_settings
def fingerprint(project: Project, **settings: Unpack[Given]) -> str:
    """The fingerprint of a store of `project` featurized with these settings (`gradstore.fingerprint`).

    Runs the model on one example of the first split, to count its logits.

    Args:
        project: model, weights and splits.
        **settings: those of `gradstore.settings.Settings`.

    Raises:
        UsageError: a setting is unusable.
        ProjectError: the project is wrong.
    """
    return fingerprint_of(identity_of_model(project, Settings(**settings)))


def identity_of_model(project: Project, settings: Settings) -> dict[str, Any]:
    """The identity, without the data, of a store of `project` featurized with these settings.

    Runs the model on one example of the first split, to count its logits.

    Raises:
        UsageError: a setting is unusable.
        ProjectError: the project is wrong.
    """
    settings.make_projection()  # which refuses what is out of range
    project.prepare()
    inputs, _ = project.examples(next(iter(project.splits))).read([0])
    with torch.no_grad():
        classes = project.logits(inputs).shape[1]
    blocks = parameter_blocks(project.model, project.parameters)
    return model_identity(project, blocks, settings, classes=classes)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, value in a, value in b) for every leaf in which two identities differ."""
    left, right = _leaves(a), _leaves(b)
    names = [*left, *(name for name in right if name not in left)]
    return [(n, left.get(n, "—"), right.get(n, "—")) for n in names if left.get(n) != right.get(n)]


def require_same(
    a: Mapping[str, Any], b: Mapping[str, Any], *, where: str | Path, theirs: str, ours: str, data: bool = True
) -> None:
    """Refuse to mix two identities that differ.

    Args:
        a: identity of what exists, shown in the column `theirs`.
        b: identity of what was asked for, shown in the column `ours`.
        where: the path in question.
        theirs: heading of the first column.
        ours: heading of the second column.
        data: whether the data must agree too; not so for a query store.

    Raises:
        MismatchError: lists every field that differs, in two columns.
    """
    found = differences(a, b)
    if not data:
        found = [row for row in found if not row[0].startswith("data.")]
    if not found:
        return
    hint = (
        "Choose another --out, or the settings of the store"
        if data
        else "Featurize both with the same weights and settings"
    )
    raise MismatchError(
        f"what {theirs} holds and what {ours} asks for differ in {len(found)} field(s)",
        where=where,
        hint=hint,
        table=[[_short(cell) for cell in row] for row in (("", theirs, ours), *found)],
    )


def _leaves(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found.update(_leaves(item, f"{prefix}{name}."))
        elif isinstance(item, list):
            found.update({f"{prefix}{name}[{i}]": json.dumps(entry) for i, entry in enumerate(item)})
        else:
            found[prefix + name] = str(item)
    return found


def _short(text: str) -> str:
    """The text, cut where it is long; of a digest, which says nothing to anybody, enough to tell it from others."""
    if len(text) == hashlib.sha256().digest_size * 2 and set(text) <= set("0123456789abcdef"):
        return text[:12] + "…"
    return text if len(text) <= 44 else text[:41] + "…"
