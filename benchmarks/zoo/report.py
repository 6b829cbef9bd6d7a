"""The page of the zoo, from its rows: a summary, a line a model, and what is refused, slow or not by a rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log
from statistics import fmean

Row = Mapping[str, str]
HEAD = """# Models: any classifier, right and how fast

Written by `python benchmarks/bench_models.py --write` from `benchmarks/results/models.csv`; that script says how
each number is measured. Random weights, {classes} classes. **Right**: every gradient row is within 1e-5 of float64
autograd, or as far from it as autograd in the model's own dtype is (half precision; a ReLU's kink), each parameter
looked at by itself, and the model is left as it was.
"""
NAMES = ("model", "from", "parameters", "error ‖g‖²", "error g", "by rules", "jacrev s", "times", "memory", "rows/s")
FAIR = """
Errors are the largest over rows (example, class), relative, against float64. **By rules** is the share of
parameters that a rule differentiates; the others take `torch.func` or a loop. **Times** faster than `vmap(jacrev)`
on the same batch of {n} examples, both by chunks of examples that suit them best; **memory** is the engine's peak
of that batch over jacrev's. An empty cell was not measured. Of a model with a star the last table says why.

Below 1 the engine is the slower one. Each batch is checked as well: the forward pass is watched call by call, one more
backward pass proves that every row belongs to its example, and the model is put back as it was. That takes much of the
time of models as small as most of these.
"""


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    most = max((int(row["n"]) for row in rows if row["n"]), default=0)
    main = [row for row in rows if row["n"] in ("", str(most))]
    parts = [HEAD.format(classes=10), _summary(main), FAIR.format(n=most or 32), _models(main)]
    few = [row for row in rows if row["n"] not in ("", str(most)) and row["speedup"]]
    if few:
        parts.append("\n## Few examples\n\n" + _few(few))
    for title, lines in (
        ("Not right, or with a star", _not_plain(main)),
        ("Parameters that no rule covers", _reasons(main)),
    ):
        if lines:
            parts.append(f"\n## {title}\n\n" + lines)
    return "".join(parts) + _where(rows)


def _summary(rows: Sequence[Row]) -> str:
    counts = Counter(row["outcome"] for row in rows)
    shares = [float(row["share_structured"]) for row in rows if row["share_structured"]]
    speeds = sorted((float(row["speedup"]), row["model"]) for row in rows if row["speedup"])
    cannot = sum(row["jacrev_why"].startswith("cannot") for row in rows)
    lines = [
        ("models", str(len(rows))),
        *((outcome, str(count)) for outcome, count in counts.most_common()),
        ("parameters by rules, mean over models", f"{100 * fmean(shares):.1f} %" if shares else ""),
    ]
    if speeds:
        mean = exp(fmean(log(speed) for speed, _ in speeds))
        lines += [
            ("times faster than `vmap(jacrev)`, geometric mean", f"{mean:.2f}, over {len(speeds)} models"),
            ("the slowest", f"{speeds[0][0]:.2f}: {speeds[0][1]}"),
            ("`vmap(jacrev)` cannot", str(cannot)),
        ]
    return "\n" + _table(("measure", "value"), lines)


def _models(rows: Sequence[Row]) -> str:
    return "\n" + _table(NAMES, [_line(row) for row in rows if row["outcome"] == "right"])


def _line(row: Row) -> tuple[str, ...]:
    ours, theirs = row["gradstore_peak_MB"], row["jacrev_peak_MB"]
    memory = f"{float(ours) / float(theirs):.2f}" if ours and theirs and float(theirs) > 1 else ""
    note = " *" if row["why"] else ""
    return (
        row["model"] + note,
        row["source"],
        f"{int(row['parameters']):,}",
        row["error_sq_norm"],
        row["error_gradient"],
        f"{100 * float(row['share_structured']):.1f} %",
        "cannot" if row["jacrev_why"].startswith("cannot") else row["jacrev_s"],
        row["speedup"],
        memory,
        f"{int(row['rows_per_s']):,}" if row["rows_per_s"] else "",
    )


def _few(rows: Sequence[Row]) -> str:
    sizes = sorted({int(row["n"]) for row in rows})
    speeds = {(row["model"], int(row["n"])): row["speedup"] for row in rows}
    models = dict.fromkeys(row["model"] for row in rows)
    lines = [(model, *(speeds.get((model, n), "") for n in sizes)) for model in models]
    return _table(("model", *(f"times, {n} examples" for n in sizes)), lines)


def _not_plain(rows: Sequence[Row]) -> str:
    lines = [(row["model"], row["outcome"], row["why"]) for row in rows if row["outcome"] != "right"]
    lines += [(f"{row['model']} *", "right", row["why"]) for row in rows if row["outcome"] == "right" and row["why"]]
    return _table(("model", "outcome", "why"), lines) if lines else ""


def _reasons(rows: Sequence[Row]) -> str:
    lines = [(row["model"], row["reasons"]) for row in rows if row["reasons"]]
    return _table(("model", "share of the parameters, and their route"), lines) if lines else ""


def _counted(count: str, what: str) -> str:
    return f"{count} {what}" + "s" * (count != "1")


def _where(rows: Sequence[Row]) -> str:
    places = dict.fromkeys(
        f"{row['device']} ({row['cpu']}, {row['simd']}), {_counted(row['threads'], 'thread')}, Python {row['python']}, "
        f"torch {row['torch']}, seed {row['seed']}"
        for row in rows
    )
    return "\nMeasured on: " + "; ".join(places) + ".\n"


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [names, ["---"] * len(names), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in cells)
