"""Top-k: the training rows that a kernel finds most similar to each query, over all training rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradstore.errors import UsageError
from gradstore.indices import RowChoice
from gradstore.kernels.definitions import projected_kernel
from gradstore.machine.byte_counts import format_bytes, parse_bytes
from gradstore.search.class_weights import Classes
from gradstore.search.error_bars import with_error_bars
from gradstore.search.request import Request
from gradstore.search.scan import ExactSearch
from gradstore.search.topk_result import RESULT_BYTES, Search, TopK
from gradstore.store.rows import Rows

if TYPE_CHECKING:
    from gradstore.search.index.approximate import ApproximateSearch
    from gradstore.search.index.certified import CertifiedSearch

__all__ = ["Search", "TopK", "topk"]

MODES = ("exact", "certified", "approx")


def topk(
    train: Rows,
    queries: Rows,
    k: int = 5,
    kernel: str = "proj-trntk",
    *,
    rows: RowChoice | None = None,
    classes: Classes = None,
    mode: str = "exact",
    memory: int | str = "1GB",
    engine: str = "auto",
    error_bars: bool = False,
) -> TopK:
    """The k training rows that a kernel finds most similar to each query, over all training rows.

    Blocks of the training store are multiplied in integers, bfloat16 or float32 under a rigorous error bound; whatever
    could be among the k best is scored again in float64. So neither values nor order depend on memory, block size,
    engine or threads: similarity descending, then row ascending.

    Args:
        train: store of the training split, or any `Rows`.
        queries: store of another split, or any `Rows`, with the same fingerprint.
        k: neighbours a query.
        kernel: a name in `gradstore.kernels.definitions.PROJECTED`.
        rows: rows of the query store, as indices in any order or a bool mask; default all.
        classes: compare Φ = Σ_c w_c φ^c instead: weights as a mapping or text ("cat - dog": why the one rather than the
            other), or "predicted" for the class that the network predicts for each query. The kernel then decides only
            whether it is a cosine.
        mode: "exact" reads every row; "certified" finds the same through an index, which it builds where there is
            none; "approx" re-ranks the candidates of that index and says which recall was measured.
        memory: bytes, or text like "2GB", the result's 24·m·k among them; held beside the index where one is used.
        engine: of mode "exact", one of `gradstore.arithmetic.names.ENGINES`; "auto" measures.
        error_bars: fill in `TopK.standard_error`, the uncertainty that the projection brings to each similarity.

    Returns:
        The neighbours, indices int64 [m, k] and similarity float64 [m, k].

    Raises:
        UsageError: an unknown kernel, class or engine, k larger than the training store, a row that does not exist
            or is absent, too little memory.
        MismatchError: the stores are not of one model and one projection.
        CorruptError: a row does not match its digest.
        NonFiniteError: a row has no direction; names it.

    Example:
        >>> found = gs.topk(train, test, k=5)
        >>> found.indices.shape, found.similarity.shape
        ((8, 5), (8, 5))
    """
    request = Request.checked(train, queries, k, projected_kernel(kernel), rows, classes, parse_bytes(memory))
    searcher = _searcher(request, mode, memory, engine, weighted=classes is not None)
    result = TopK.of(request, searcher.search(request))
    return with_error_bars(result, request.phis) if error_bars else result


def _searcher(
    request: Request, mode: str, memory: int | str, engine: str, *, weighted: bool
) -> ExactSearch | CertifiedSearch | ApproximateSearch:
    """What answers the request in a mode."""
    if mode not in MODES:
        raise UsageError("unknown mode", where="--mode", expected=f"one of {', '.join(MODES)}", got=repr(mode))
    if mode == "exact":
        return ExactSearch(parse_bytes(memory), engine)
    result = RESULT_BYTES * len(request.rows) * request.k
    left = parse_bytes(memory) - result
    if left < 1:
        expected = f"at least {format_bytes(result)} for the result alone"
        hint = "Ask for a smaller -k, or for fewer --rows at a time"
        raise UsageError("too little memory", where="--memory", expected=expected, got=memory, hint=hint)
    if weighted:
        raise UsageError("an index serves no class weights", where="--mode", expected="exact", got=mode)
    from gradstore.search.session import Session  # a search of all rows needs no index

    return Session(request.train.require_stored("an index"), request.kernel.name, memory=left).searcher(mode)
