"""`gradstore fit`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .loading import load
from .options import MOST, PATH, as_json, kernel_option, memory_option
from .output import print_json, print_pairs, print_table, say
from .writing import Writing, output_option

if TYPE_CHECKING:
    from gradstore.explain.surrogate import KernelGLM


@click.command(
    cls=Writing,
    short_help="Fit a surrogate of the network.",
    epilog="Example: gradstore fit stores/train --out surrogate.safetensors --alpha auto",
)
@click.argument("train", type=PATH)
@output_option("--out", "File to write, or to replace.", required=True)
@kernel_option
@click.option(
    "--backend",
    default="multinomial",
    show_default=True,
    type=click.Choice(["multinomial", "sgd"]),
    help="Softmax cross-entropy, or the paper's one-vs-rest by stochastic gradient descent.",
)
@click.option("--alpha", default="1e-4", show_default=True, help="Strength of the penalty, or auto.")
@click.option(
    "--select",
    default="tau",
    show_default=True,
    type=click.Choice(["tau", "likelihood"]),
    help="What auto goes by on rows held out.",
)
@click.option(
    "--target",
    default="labels",
    show_default=True,
    type=click.Choice(["labels", "predictions", "probabilities"]),
    help="What is learnt: the labels, or the network's own outputs.",
)
@click.option("--max-iter", default=2000, show_default=True, type=click.IntRange(1, MOST), help="Iterations or epochs.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of orders and rows held out.")
@click.option("--scratch", type=PATH, help="Where sgd may put a Gram matrix (4 n² bytes).")
@memory_option("2GB")
@as_json
def fit(train: Path, out: Path, memory: str, as_json: bool, alpha: str, seed: int, **settings: Any) -> None:
    """Fit a kernel generalised linear model that imitates the network (eq. 1).

    TRAIN is the store of the training split. The surrogate is bound to its fingerprint.
    """
    import gradstore as gs

    store = gs.open(train)
    load("KernelGLM")
    model = gs.KernelGLM(alpha=_strength(alpha), memory=memory, random_state=seed, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(store)
    model.save(out)
    say(f"wrote {out}")
    for warning in caught:
        say(f"warning: {warning.message}")
    report = _report(model, len(store.present_at))
    if as_json:
        print_json(report)
    else:
        _print(report, model.select)


def _strength(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _print(report: dict[str, Any], select: str) -> None:
    scores = report.pop("alpha_scores")
    report["loss"] = f"{report['loss']:.6g}"
    report["converged"] = "yes" if report["converged"] else "no"
    print_pairs({name: str(value) for name, value in report.items()})
    if scores:
        held_out = {"tau": "τ", "likelihood": "mean log-likelihood"}[select]
        rows = [
            (alpha, f"{score:.4f}", "chosen" * (float(alpha) == report["alpha"])) for alpha, score in scores.items()
        ]
        click.echo()
        print_table(("alpha", f"{held_out} on rows held out", ""), rows, right=(0, 1))


def _report(model: KernelGLM, rows: int) -> dict[str, Any]:
    return {
        "kernel": model.kernel,
        "backend": model.backend,
        "rows": rows,
        "classes": model.coef_.shape[0],
        "alpha": model.alpha_,
        "alpha_scores": {f"{alpha:g}": score for alpha, score in model.alpha_scores_.items()},
        "iterations": model.n_iter_,
        "loss": model.loss_,
        "converged": model.converged_,
        "reason": model.reason_,
    }
