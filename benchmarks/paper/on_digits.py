"""Run the whole set on digits: tables as Markdown and CSV, figures as PNG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.adversarial import error_rates
from benchmarks.paper.digits import Collected, collect, report, taus
from benchmarks.paper.order import order_table
from benchmarks.paper.tables import markdown, over_seeds, write_csv
from benchmarks.paper.thought_experiment import convergence, pairs
from benchmarks.setting import setting

RADII = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2)


def on_digits(out: Path, seeds: int, say: Callable[[str], None], *, proj_dim: int = 10240) -> Path:
    """Write `digits.md`, `digits.csv`, `adversarial.csv` and the figures to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    found = collect(seeds, say, proj_dim=proj_dim)
    attacked = []
    for seed in range(seeds):
        say(f"seed {seed}: attacks")
        attacked += list(error_rates(seed, RADII))
    where = {name: value for name, value in setting(0).items() if name != "seed"} | {"K": proj_dim}
    write_csv(out / "digits.csv", [{**row, **where} for row in found.rows])
    write_csv(out / "adversarial.csv", [{**row, **where} for row in attacked])
    facts = draw(found, attacked, out, proj_dim)
    text = "\n".join([_heading(seeds, proj_dim, where), report(found), _figures(facts), _verdict(found)])
    (out / "digits.md").write_text(text)
    return out / "digits.md"


def draw(found: Collected, attacked: list[dict[str, object]], out: Path, proj_dim: int) -> dict[str, float]:
    """All figures; returns the residuals' mean, median, 99th percentile and maximum."""
    experiment, judged = found.ten[0]
    figures.most_similar(experiment, out / "fig01.png")
    drawn = {figures.NAMES[kernel]: judged[f"{kernel} multinomial"] for kernel in ("trntk", "ck")}
    figures.realisation(drawn, out / "fig02.png")
    facts = figures.residuals(experiment, out / "fig04.png", proj_dim)
    figures.made_up(pairs(), out / "fig05.png")
    figures.converging(list(convergence()), out / "fig06.png")
    figures.attacks(attacked, out / "fig07.png")
    for number, (name, judgements) in enumerate(found.binary.items(), 8):
        figures.by_seed(name, judgements, out / f"fig{number:02d}.png")
    return facts


def _heading(seeds: int, proj_dim: int, where: dict[str, object]) -> str:
    ran = ", ".join(f"{name} {value}" for name, value in where.items())
    return f"""# The paper's experiments on scikit-learn's digits

`python -m benchmarks.paper --digits --seeds {seeds}`, K = {proj_dim:,}. Means over seeds (split, weights,
projection) with standard errors of the mean. `sgd` is the paper's fit (one-vs-rest, alpha 1e-2; 1e-4 for two classes),
`multinomial` cross-entropy of the softmax, as the paper's text has it (alpha 1e-4). TAD is surrogate minus network.
τ is of the correct class's probability.

Ran on: {ran}.
"""


def _figures(facts: dict[str, float]) -> str:
    made_up = "; ".join(
        f"{pair.name}: " + ", ".join(f"{name} {value:.3f}" for name, value in pair.measures().items())
        for pair in pairs()
    )
    residual = ", ".join(f"{name} {value:.5f}" for name, value in facts.items())
    return f"""## Figures

- fig01: most similar training digits. fig02: linear realisation, every class.
- fig04: |proj-trNTK - trNTK|: {residual}.
- fig05 (App. H): {made_up}. fig06: how each correlation nears 1 as the noise vanishes.
- fig07 (App. J): errors under PGD-7; every number is in adversarial.csv.
- fig08-fig11: linear realisation of the small networks, the second class, a panel a seed.
"""


def _verdict(found: Collected) -> str:
    """What the tables say of the paper's claims, from their own numbers."""
    lines = ["## What this says of the paper's claims\n"]
    for backend in ("sgd", "multinomial"):
        trntk, projected, ck = (taus(found, kernel, backend) for kernel in ("trntk", "proj-trntk", "ck"))
        lines.append(
            f"- {backend}: τ of trNTK {trntk.mean():.3f} ({'≥' if trntk.mean() >= 0.7 else '<'} 0.7); "
            f"trNTK − CK, paired by seed, {over_seeds((trntk - ck).tolist())}; "
            f"|proj-trNTK − trNTK| {abs(projected.mean() - trntk.mean()):.3f}."
        )
    aligned = {
        layer: over_seeds(
            [float(str(r["cosine"])) for r in found.rows if r["table"] == "alignment" and r["last layer"] == layer]
        )
        for layer in ("trained", "as drawn")
    }
    table = markdown("trNTK against CK: what decides their order", order_table(found.rows))
    return "\n".join([*lines, "", table, _reasons(aligned)])


def _reasons(aligned: dict[str, str]) -> str:
    """Says which rows answer which question; the numbers are the table's."""
    return f"""Rows "trained" are of the network of Table 2, trained to the end by cross-entropy.
- Softmax: CK is above trNTK whatever the penalty. The network's logits are V h(x) + c, linear in what the CK compares,
  and a softmax fitted to the same labels finds nearly the same V again: the cosine between its class vectors and V is
  {aligned["trained"]}.
- Rows "as drawn" are the control: the same network, everything trained but V, which stays as it was drawn (cosine
  {aligned["as drawn"]}: the layers below adapt to V). Nothing was fitted to the labels in V, and CK's lead is as the
  table says.
- sgd, the paper's fit, mixes two more things in. It stops before the minimum of its objective, whose own τ is in the
  table. And its probabilities are one-vs-rest, each class's sigmoid over the sum of the sigmoids; a softmax of the very
  same logits orders the kernels the other way. An order of kernels under sgd is one of fits as much as of kernels.
- Not shown here, but it fits: the heads of the paper's BERT models were trained from a random start for a few epochs
  on a network that had learnt elsewhere, which is nearer to "as drawn".
"""
