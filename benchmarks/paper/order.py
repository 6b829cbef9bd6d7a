"""What decides whether trNTK or CK comes out above: the loss, the penalty, the probabilities, or the network itself.

The network's logits are V h(x) + c, linear in what the CK compares, h(x). A network trained to the end by cross-entropy
has in V nearly the solution that a surrogate on h finds again from the same labels, so its CK surrogate begins with an
advantage. The control takes it away: a network whose V stays as it was drawn, while everything below it is trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from torch import nn

from benchmarks.paper.digits_data import ten_classes
from benchmarks.paper.experiment import BACKENDS, Experiment, run, surrogate
from benchmarks.paper.tables import Row, grouped, over_seeds
from gradstore.demo.digits import SmallCNN
from gradstore.explain.faithfulness import kendall
from gradstore.explain.surrogate.alpha import log_odds

KERNELS = ("trntk", "ck")
ALPHAS = (1e-2, 1e-4, 1e-6)


def order_rows(found: Experiment, seed: int) -> Iterator[dict[str, object]]:
    """τ of both kernels under every fit of a network, and under one of the network whose last layer is not trained."""
    for kernel in KERNELS:
        for fit, basis in _fits(found, kernel):
            yield _row(found, "trained", kernel, fit, basis, seed)
    control = untrained_head(seed)
    for kernel in KERNELS:
        model = surrogate(control, kernel, "multinomial")
        yield _row(
            control, "as drawn", kernel, "softmax, alpha 1e-4", model.logits(control.grams[kernel]["test"]), seed
        )
    for name, experiment in (("trained", found), ("as drawn", control)):
        yield {"table": "alignment", "last layer": name, "seed": seed, "cosine": alignment(experiment)}


def order_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One row a network and fit: τ of both kernels, and their difference paired by seed."""
    table = []
    for (layer, fit), members in grouped([r for r in rows if r["table"] == "order"], ("last layer", "fit")).items():
        line = {"last layer": str(layer), "fit": str(fit)}
        trntk, ck = ([float(str(r["tau"])) for r in members if r["kernel"] == kernel] for kernel in KERNELS)
        line |= {"τ trNTK": over_seeds(trntk), "τ CK": over_seeds(ck)}
        line["trNTK − CK"] = over_seeds([a - b for a, b in zip(trntk, ck, strict=True)])
        table.append(line | {"seeds": str(len(trntk))})
    return table


def _fits(found: Experiment, kernel: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, numbers whose softmax is the probabilities of the test split)."""
    queries = found.grams[kernel]["test"]
    for alpha in ALPHAS:
        yield f"softmax, alpha {_short(alpha)}", surrogate(found, kernel, "multinomial", alpha=alpha).logits(queries)
    for name, changes in (("until it stops", {}), ("300 epochs", {"tolerance": 0.0})):
        model = surrogate(found, kernel, "sgd", **changes)
        yield f"sgd {name}", model.log_odds_basis(queries)
        yield f"sgd {name}, softmax of its logits", model.logits(queries)
    weights, intercept = minimum_of_sgd(found.grams[kernel]["train"], found.outputs["train"].labels)
    yield "minimum of sgd's objective", log_expit(queries @ weights.T + intercept)


def minimum_of_sgd(gram: np.ndarray, labels: np.ndarray, alpha: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(W [classes, n], b [classes]) at the minimum of what scikit-learn's SGDClassifier descends, by L-BFGS.

    1/n Σ_i s_ic log(1 + exp(∓ f_c(x_i))) + alpha/2 ‖W_c‖² for each class c, where s weights a row of the class by n
    over classes and rows of its class, and any other row by 1.
    """
    alpha = float(str(BACKENDS["sgd"]["alpha"])) if alpha is None else alpha
    n, classes = len(gram), int(labels.max()) + 1
    signs = np.where(np.eye(classes)[labels] == 1, 1.0, -1.0)
    weights = np.where(signs > 0, n / (classes * np.bincount(labels)), 1.0)

    def objective(p: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = p[:-classes].reshape(classes, n), p[-classes:]
        margins = signs * (gram @ w.T + b)
        slope = -weights * signs * expit(-margins) / n
        value = -(weights * log_expit(margins)).sum() / n + alpha / 2 * (w**2).sum()
        return value, np.concatenate([(slope.T @ gram + alpha * w).ravel(), slope.sum(0)])

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-11, "gtol": 1e-7}
    found = minimize(objective, np.zeros(classes * (n + 1)), jac=True, method="L-BFGS-B", options=options).x
    return found[:-classes].reshape(classes, n), found[-classes:]


def untrained_head(seed: int) -> Experiment:
    """Both kernels of the ten-class network, of which all but the last layer was trained."""
    project = ten_classes(seed, _frozen_head)
    project.model.requires_grad_(True)  # kernels are with respect to all parameters, as those of the other network
    with tempfile.TemporaryDirectory() as folder:
        return run(project, Path(folder), kernels=KERNELS, seed=seed)


def alignment(found: Experiment) -> float:
    """Cosine between the last layer and the CK surrogate's class vectors Σ_i W_ci h(x_i)/‖h(x_i)‖, means removed."""
    model = found.project.model
    assert isinstance(model, nn.Sequential)
    pixels = torch.stack([found.project.splits["train"][i][0] for i in range(len(found.outputs["train"].labels))])
    with torch.no_grad():
        h = nn.Sequential(*list(model)[:-1])(pixels).double().numpy()
    vectors = surrogate(found, "ck", "multinomial").coef_ @ (h / np.linalg.norm(h, axis=1, keepdims=True))
    head = model[-1].weight.detach().double().numpy()  # type: ignore[union-attr]
    a, b = vectors - vectors.mean(0), head - head.mean(0)
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def _frozen_head(classes: int) -> SmallCNN:
    model = SmallCNN(classes)
    model[-1].requires_grad_(False)
    return model


def _row(found: Experiment, layer: str, kernel: str, fit: str, basis: np.ndarray, seed: int) -> dict[str, object]:
    outputs = found.outputs["test"]
    tau = kendall(log_odds(outputs.logits, outputs.labels), log_odds(basis, outputs.labels)).value
    return {"table": "order", "last layer": layer, "fit": fit, "kernel": kernel, "seed": seed, "tau": tau}


def _short(alpha: float) -> str:
    return f"{alpha:.0e}".replace("e-0", "e-")
