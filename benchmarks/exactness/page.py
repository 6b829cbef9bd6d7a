"""The tables of docs/sparse.md, from the benchmarks' files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan, sqrt
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.exactness.models import HARD, TRAINED
from gradstore.projection.kinds import DEFAULT, KINDS

PAGE = Path(__file__).parents[2] / "docs" / "sparse.md"
TITLES = {case.name: case.title for case in (*TRAINED, *HARD)} | {"demo": "the demo's poisoned digits"}
MAIN_K, KERNEL = "10240", "proj-trntk"

Row = Mapping[str, str]
Tables = Mapping[str, Sequence[Row]]
"""Rows by the name of their file."""


def with_tables(page: str, tables: Tables) -> str:
    """The page with every table made anew; each stands between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        head, found, rest = page.partition(begin)
        if not found:
            raise ValueError(f"{PAGE} has no {begin.strip()}")
        page = head + begin + table(tables) + end + rest.partition(end)[2]
    return page


def residuals(tables: Tables) -> str:
    """|projected - exact| of the trNTK at K = 10240, a line a model and kind."""
    rows = _chosen(tables["kinds"], TRAINED, kernel=KERNEL, K=MAIN_K)
    lines = (
        [
            *(TITLES[row["case"]], row["kind"]),
            *(f"{float(row[name]):.5f}" for name in ("mean", "p99", "p999", "max")),
            *(_ratio(row), row["seeds"], f"{int(row['max_of']):,}"),
        ]
        for row in rows
    )
    heads = ["model", "kind", "mean", "p99", "p99.9", "largest", "mean / rademacher", "P", "largest of so many P"]
    return _table(heads, lines)


def ratios(tables: Tables) -> str:
    """Ratio of mean residuals to signs, by K and kernel."""
    dimensions = sorted({int(row["K"]) for row in tables["kinds"]})
    lines = []
    for case in TRAINED:
        for kernel in ("proj-trntk", "proj-pntk"):
            for kind in (kind for kind in KINDS if kind != DEFAULT):
                found = {r["K"]: r for r in _chosen(tables["kinds"], [case], kernel=kernel, kind=kind)}
                if found:
                    cells = (_ratio(found[str(K)]) if str(K) in found else "" for K in dimensions)
                    lines.append([case.title, kernel, kind, *cells])
    return _table(["model", "kernel", "kind", *(f"K = {K}" for K in dimensions)], lines)


def tails(tables: Tables) -> str:
    """How heavy the tails of the trNTK's residuals are, a line a model and K."""
    lines = []
    for case in (*TRAINED, *HARD):
        rows = _chosen(tables["kinds"], [case], kernel=KERNEL)
        for K in sorted({int(row["K"]) for row in rows}):
            both = {row["kind"]: row for row in rows if row["K"] == str(K)}
            pair = [both[kind] for kind in (DEFAULT, "sjlt")]
            cells = (
                *(f"{float(row['rms']):.4f}" for row in pair),
                *(f"{float(row['p999']):.3f}" for row in pair),
                *(f"{float(row['max']):.3f}" for row in pair),
                *(f"{float(row['kurtosis']):.1f}" for row in pair),
                *(_rare(row) for row in pair),
            )
            lines.append([case.title, str(K), *cells])
    measures = ("rms", "p99.9", "largest", "kurtosis", "beyond 5 rms")
    return _table(["model", "K", *(f"{m}, {kind}" for m in measures for kind in ("±1", "sjlt"))], lines)


def explained(tables: Tables) -> str:
    """Explanations by each kind, a line a model, K and kind; means over seeds."""
    rows = tables["kinds_explained"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        for kernel in ("proj-trntk", "proj-pntk"):
            for K in sorted({row["K"] for row in rows if row["case"] == case}, key=lambda K: int(K or 0)):
                for kind in ("exact", *KINDS):
                    key = {"case": case, "kernel": kernel, "K": K, "kind": kind}
                    found = [row for row in rows if all(row[name] == value for name, value in key.items())]
                    if found:
                        measured = (_over_seeds(row[name] for row in found) for name in MEASURES)
                        lines.append([TITLES[case], kernel, K, kind, *measured, str(len(found))])
    return _table(["model", "kernel", "K", "kind", *MEASURES.values(), "seeds"], lines)


def seconds(tables: Tables) -> str:
    """The newest run of featurize by each kind, as rows a second."""
    newest = {(row["model"], row["projection"]): row for row in tables["featurize"]}
    lines = []
    for model in dict.fromkeys(model for model, _ in newest):
        for kind in (kind for kind in KINDS if (model, kind) in newest):
            row = newest[model, kind]
            base, rate = newest[model, DEFAULT], float(row["rows_per_second"])
            paired = row["cpu"] == base["cpu"] and row["date"][:10] == base["date"][:10]
            times = f"{rate / float(base['rows_per_second']):.1f}" if paired else ""
            lines.append([TITLES.get(model, model), kind, row["K"], f"{1000 / rate:,.1f}", times, row["cpu"]])
    return _table(["model", "kind", "K", "seconds for 1,000 rows", "times rademacher", "processor"], lines)


def ran(tables: Tables) -> str:
    """On what residuals and explanations were computed, a line each."""
    columns = ("cpu", "simd", "threads", "python", "torch", "numpy")
    rows = (*tables["kinds"], *tables["kinds_explained"])
    return _table(columns, dict.fromkeys(tuple(row[name] for name in columns) for row in rows))


TABLES: Mapping[str, Callable[[Tables], str]] = {
    "residuals": residuals,
    "ratios": ratios,
    "tails": tails,
    "explained": explained,
    "seconds": seconds,
    "ran": ran,
}
MEASURES = {"top5": "top-5 agreement", "tau": "τ", "precision": "precision", "recall": "recall"}


def _chosen(rows: Sequence[Row], cases: Iterable[object], **key: str) -> list[Row]:
    """Rows of the cases, in their order, whose columns are as given."""
    names = [case.name for case in cases]  # type: ignore[attr-defined]
    found = [row for row in rows if row["case"] in names and all(row[k] == value for k, value in key.items())]
    return sorted(found, key=lambda row: names.index(row["case"]))


def _ratio(row: Row) -> str:
    if row["kind"] == DEFAULT:
        return "1"
    error = float(row["ratio_se"])
    return "" if isnan(error) else f"{float(row['ratio']):.3f} ± {error:.3f}"


def _rare(row: Row) -> str:
    share = float(row["far_share"])
    return f"{share:.1e}" if share else "0"


def _over_seeds(values: Iterable[str]) -> str:
    """Mean ± standard error; empty where there are none."""
    found = [float(value) for value in values if value]
    if not found:
        return ""
    return f"{fmean(found):.3f}" + (f" ± {stdev(found) / sqrt(len(found)):.3f}" if len(found) > 1 else "")


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---" if head in ("model", "kernel", "kind", "processor", "cpu") else "---:" for head in heads]
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, rule, *lines))
