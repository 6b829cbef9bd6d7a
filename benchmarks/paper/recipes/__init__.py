"""The paper's experiments, one project file each; `gradstore featurize` reads them as any other.

    PYTHONPATH=. gradstore check benchmarks/paper/recipes/cnn_mnist2.py -o data=mnist -o seed=3
    python -m benchmarks.paper cnn_mnist2 --data mnist --seeds 100
    python -m benchmarks.paper cnn_mnist2 --data mnist -o seed=3       # one of them, added to those that are known

A recipe's `project(data, seed, …)` trains the network, unless `data` holds its weights from an earlier run. Stores and
Gram files stay there too, so that a run continues where it was interrupted.
"""

from benchmarks.paper.recipes.runner import run_recipes

__all__ = ["run_recipes"]
