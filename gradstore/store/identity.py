"""What a store says it is: nested plain JSON values, which must agree before rows are continued, compared or mixed.

Rows were made from ``identity["data"]``; all the rest says how, and its digest is the fingerprint. What makes an
identity of a model and its settings is `fingerprint.py`; here nothing knows of either, so that stores are compared
where there is no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradstore.errors import MismatchError


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """128 bits over an identity without its data, as 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(without_data(identity), sort_keys=True).encode()).hexdigest()[:32]


def without_data(identity: Mapping[str, Any]) -> dict[str, Any]:
    """All of an identity that does not say which rows there are."""
    return {name: value for name, value in identity.items() if name != "data"}


def put(identity: dict[str, Any], at: Sequence[str], value: Any) -> None:
    """Name a value in an identity, at the end of a path of names such as ``("projection", "K")``."""
    *above, name = at
    for step in above:
        identity = identity.setdefault(step, {})
    identity[name] = value


def take(identity: Mapping[str, Any], at: Sequence[str], *default: Any) -> Any:
    """Look up what `put` has named.

    Args:
        identity: where to look.
        at: the path.
        *default: one value, for identities that do not name it.

    Returns:
        The value.

    Raises:
        KeyError: nothing is named so, and there is no default.
    """
    *above, name = at
    for step in above:
        identity = identity[step]
    return identity.get(name, *default) if default else identity[name]


def require_featurized(identity: Mapping[str, Any], *, where: object = None) -> None:
    """Refuse an imported store, whose rows nothing here can compute again.

    Args:
        identity: of the store.
        where: its path, for the error.

    Raises:
        MismatchError: names the tool that made the features.
    """
    if "imported" in identity:
        raise MismatchError(
            "imported features cannot be computed again, nor others like them",
            where=where,
            expected="a store that `gradstore featurize` wrote",
            got=f"features of {identity['imported']['tool']}",
        )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, value in a, value in b) for every leaf in which two identities differ."""
    left, right = _leaves(a), _leaves(b)
    names = [*left, *(name for name in right if name not in left)]
    return [(n, left.get(n, "—"), right.get(n, "—")) for n in names if left.get(n) != right.get(n)]


def require_same(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    where: str | Path,
    theirs: str,
    ours: str,
    data: bool = True,
    hint: str = "",
) -> None:
    """Refuse to mix two identities that differ.

    Args:
        a: identity of what exists, shown in the column `theirs`.
        b: identity of what was asked for, shown in the column `ours`.
        where: the path in question.
        theirs: heading of the first column.
        ours: heading of the second column.
        data: whether the data must agree too; not so for a query store.
        hint: what to do about it, where that is not to featurize otherwise.

    Raises:
        MismatchError: lists every field that differs, in two columns.
    """
    found = differences(a, b)
    if not data:
        found = [row for row in found if not row[0].startswith("data.")]
    if not found:
        return
    hint = hint or (
        "Choose another --out, or the settings of the store"
        if data
        else "Featurize both with the same weights and settings; `gradstore featurize --like` takes those of a store"
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
