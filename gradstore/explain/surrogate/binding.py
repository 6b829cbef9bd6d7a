"""What a surrogate was fitted on, so that it is never asked about something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradstore.errors import MismatchError, UsageError
from gradstore.kernels.gram_matrix import Gram
from gradstore.store.identity import require_same
from gradstore.store.rows import Rows

KINDS = ("store", "gram", "array")
# What must agree between the Gram matrix of the training examples and that of the queries with them.
_GRAM_FIELDS = ("kernel", "fingerprint", "weights", "parameters", "layers")


@dataclass(frozen=True)
class Binding:
    """The training examples of a surrogate.

    Attributes:
        kind: "store", "gram" or "array".
        source: path of the store or of the Gram matrix, or those of several stores; "" for what is in memory.
        identity: of the store with what its rows are made of, or attributes of the matrix; empty for an array.
    """

    kind: str
    source: str | list[str] = ""
    identity: Mapping[str, Any] | None = None

    @classmethod
    def of_store(cls, store: Rows) -> Binding:
        """Bound to the weights, projection, classes and data of stored rows; not to what annotations say of them."""
        return cls("store", store.source, {**store.identity, "data": store.data})

    @classmethod
    def of_gram(cls, gram: Gram) -> Binding:
        """Bound to the kernel, the model and the rows of a symmetric Gram matrix."""
        names = (*_GRAM_FIELDS, "data_a", "split_a")
        return cls("gram", str(gram.path.resolve()), {n: gram.attributes[n] for n in names if n in gram.attributes})

    def require_queries(self, store: Rows) -> None:
        """Refuse queries that were not featurized with the same weights and settings.

        Raises:
            MismatchError: lists every field that differs.
            UsageError: the surrogate was not fitted on a store, or the store is unfinished.
        """
        self.require_kind("store", store)
        require_same(self._known(), store.identity, where=store.where, theirs="surrogate", ours=store.where, data=False)
        store.require_complete()

    def require_training_store(self, store: Rows) -> None:
        """Refuse a store that is not the one the surrogate was fitted on, data included.

        Raises:
            MismatchError: lists every field that differs.
        """
        self.require_kind("store", store)
        require_same(
            self._known(),
            {**store.identity, "data": store.data},
            where=store.where,
            theirs="surrogate",
            ours=store.where,
            hint="Name the store that it was fitted on; several, in the same order",
        )
        store.require_complete()

    def require_query_gram(self, gram: Gram) -> None:
        """Refuse a Gram matrix [m, n] whose columns are not the training examples.

        Raises:
            MismatchError: kernel, model or columns differ.
        """
        self.require_kind("gram", gram)
        known = self._known()
        theirs = {name: known[name] for name in known if name in _GRAM_FIELDS} | {"columns": known["data_a"]}
        ours = {name: gram.attributes.get(name, "—") for name in known if name in _GRAM_FIELDS}
        require_same(
            theirs,
            ours | {"columns": gram.attributes["data_b"]},
            where=gram.path,
            theirs="surrogate",
            ours=str(gram.path),
            data=False,
        )

    def require_kind(self, kind: str, given: object) -> None:
        """Refuse queries of another kind than the training examples.

        Raises:
            UsageError: says what is needed instead.
        """
        if kind != self.kind:
            needs = {
                "store": "a store",
                "gram": "a Gram matrix of the queries with the training examples",
                "array": "an array",
            }
            raise UsageError(
                "the surrogate cannot read this",
                where="queries",
                expected=needs[self.kind],
                got=type(given).__name__,
            )

    def _known(self) -> Mapping[str, Any]:
        if self.identity is None:
            raise MismatchError("the surrogate does not say what it was fitted on", hint="Fit it again")
        return {name: value for name, value in self.identity.items() if name != "class names"}  # of older surrogates
