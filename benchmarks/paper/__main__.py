"""`python -m benchmarks.paper`: everything on digits, or one of the paper's experiments on data of your own."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results" / "paper"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("recipe", nargs="?", help="one of the recipes; with --smoke all of them by default")
    parser.add_argument("--digits", action="store_true", help="Tables 1-5 and the figures on scikit-learn's digits")
    parser.add_argument("--smoke", action="store_true", help="run recipes end to end on small generated files")
    parser.add_argument("--data", type=Path, help="folder of the data set; weights, stores and kernels are kept there")
    parser.add_argument("--seeds", type=int, help="how many, from -o seed on (digits: 4, recipes: 1)")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="such as seed=3")
    parser.add_argument("--proj-dim", type=int, default=10240)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--memory", default="4GB", help="of exact kernels and surrogates")
    parser.add_argument("--out", type=Path, help=f"folder of tables [{RESULTS}; with --smoke, none]")
    given = parser.parse_args()
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {line}", file=sys.stderr, flush=True)

    if given.threads:
        import torch

        torch.set_num_threads(given.threads)
    if given.digits:
        from benchmarks.paper.on_digits import on_digits

        print(on_digits(given.out or RESULTS, given.seeds or 4, say, proj_dim=given.proj_dim).read_text())
        return
    from benchmarks.paper.recipes import run_recipes

    options = dict(option.partition("=")[::2] for option in given.option)
    run_recipes(
        given.recipe,
        given.data,
        given.out if given.smoke else given.out or RESULTS,
        say,
        options=options,
        smoke=given.smoke,
        proj_dim=given.proj_dim,
        seeds=given.seeds or 1,
        memory=given.memory,
    )


if __name__ == "__main__":
    main()
