"""`gradstore evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .loading import load
from .options import MOST, PATH, as_json
from .output import print_json, print_table, say

if TYPE_CHECKING:
    from gradstore.explain.linearisation import Linearisation


@click.command(
    short_help="Measure how faithful a surrogate is.",
    epilog="Example: gradstore evaluate surrogate.safetensors stores/test",
)
@click.argument("surrogate", type=PATH)
@click.argument("queries", type=PATH)
@click.option(
    "--bootstrap", default=200, show_default=True, type=click.IntRange(0, MOST), help="Resamples for the errors."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the resamples and halves.")
@as_json
def evaluate(surrogate: Path, queries: Path, bootstrap: int, seed: int, as_json: bool) -> None:
    """Compare a surrogate with its network on labelled queries: τ_K, TAD, R_miss, correlations, linearisations.

    SURROGATE is a file that `gradstore fit` wrote; QUERIES is a store with the same weights and settings.
    """
    import gradstore as gs
    from gradstore.explain.surrogate.saved_file import require_surrogate

    require_surrogate(surrogate)
    store = gs.open(queries)
    load("KernelGLM", "evaluate")
    from gradstore.explain.linearisation import linearise_store

    model = gs.KernelGLM.load(surrogate)
    found = gs.evaluate(model, store, bootstrap=bootstrap, seed=seed)
    curves = linearise_store(model, store, bootstrap=bootstrap, seed=seed)
    if as_json:
        print_json({**found.as_dict(), "linearisations": [curve.as_dict() for curve in curves]})
        return
    rows = [(name, str(measure), str(measure.n)) for name, measure in found.measures().items()]
    rows += [(f"r2 of {curve.name}", _judged(curve), str(curve.r2.n)) for curve in curves]
    print_table(("measure", "value", "queries"), rows, right=(2,))
    say(
        f"saturated probabilities: network {found.saturated[0]}, surrogate {found.saturated[1]}; "
        f"values left out of the linearisations {curves[0].masked}"
    )
    say(f"tied pairs: network {found.ties[0]}, surrogate {found.ties[1]}")


def _judged(curve: Linearisation) -> str:
    fitted = curve.converged or curve.r2.value is None
    return str(curve.r2) if fitted else f"{curve.r2} (the fit has not converged)"
