"""A store whose network's logits are not known says so, wherever a predicted class or a probability is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import clustered, write_store

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.explain.linearisation import linearise_store
from gradstore.explain.surrogate.fitting import ALPHAS
from gradstore.store.feature_store import FeatureStore
from gradstore.store.import_features import Provenance, import_features

N, C, K = 48, 3, 16


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Imported features: labels, and no logits."""
    folder = tmp_path_factory.mktemp("unknown")
    np.save(folder / "features.npy", clustered(N, C, K, seed=2))
    known = Provenance(tool="trak", model="resnet9")
    return import_features(folder / "features.npy", folder / "store", known, labels=np.arange(N) % C)


def test_predicted_classes_are_those_of_the_largest_logit(tmp_path: Path) -> None:
    logits = np.array([[1.0, 3, 2], [5, 4, 4], [np.nan, 9, 0]])
    store = write_store(tmp_path / "three", clustered(3, 3, 8), logits=logits)
    assert store.predicted.tolist() == [1, 0, -1]
    one = write_store(tmp_path / "one", clustered(3, 1, 8), logits=np.array([[0.5], [-0.5], [np.nan]]))
    assert one.predicted.tolist() == [1, 0, -1]


def test_a_search_shows_no_predicted_class(unknown: FeatureStore) -> None:
    assert unknown.predicted.tolist() == [-1] * N
    assert {record["predicted"] for record in gs.topk(unknown, unknown, 3, rows=[0, 5]).records()} == {None}
    with pytest.raises(UsageError, match=r"logits of a query are not known.*row 5"):
        gs.topk(unknown, unknown, 3, rows=[5], classes="predicted")


@pytest.mark.parametrize("target", ["predictions", "probabilities"])
def test_outputs_that_are_not_known_are_not_learnt(unknown: FeatureStore, target: str) -> None:
    with pytest.raises(UsageError, match="network's outputs are not known"):
        gs.KernelGLM(target=target).fit(unknown)


def test_alpha_is_chosen_by_likelihood(unknown: FeatureStore) -> None:
    by_default, by_likelihood = (gs.KernelGLM(alpha="auto", select=name).fit(unknown) for name in ("tau", "likelihood"))
    assert by_default.alpha_scores_ == by_likelihood.alpha_scores_
    assert len(set(by_default.alpha_scores_.values())) == len(ALPHAS["multinomial"])


def test_faithfulness_to_nothing_is_refused(unknown: FeatureStore) -> None:
    model = gs.KernelGLM(alpha=1e-3).fit(unknown)
    for ask in (gs.evaluate, linearise_store):
        with pytest.raises(UsageError, match=rf"network's logits are not known .*got {N} without, the first in row 0"):
            ask(model, unknown)
