"""S10: mutated surrogates are refused in one line, or are what was written; none is evaluated as something else."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Record
from mutations import mutated, places, with_strange_value
from safetensors.numpy import load, save
from synthetic import clustered, write_store

import gradstore as gs
from gradstore.errors import CorruptError, GradstoreError
from gradstore.explain.surrogate.binding import Binding
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.tensor_file import under_digest

pytestmark = pytest.mark.soak

EARLIER = Path(__file__).parents[1] / "data/earlier/surrogate-v1.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("s") / "train", clustered(40, 3, 16))


@pytest.fixture(scope="module")
def whole(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return gs.KernelGLM(alpha=0.1).fit(store).save(tmp_path_factory.mktemp("s") / "model").read_bytes()


def header_of(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["gradstore"])


def of_version_1(data: bytes) -> bytes:
    """The same surrogate as earlier versions wrote it, without a digest."""
    return save(load(data), metadata={"gradstore": json.dumps({**header_of(data), "version": 1})})


def told(path: Path, store: FeatureStore) -> np.ndarray | GradstoreError:
    """What a surrogate says of a store, or the one line in which it is refused."""
    try:
        model = gs.KernelGLM.load(path)
        gs.attribute(model, store, 0)
        return model.logits(store)
    except GradstoreError as error:
        return error


def test_mutated_surrogates(
    store: FeatureStore, whole: bytes, fast: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    rng, path, count = np.random.default_rng(0), fast / "model", amount(1500, 40_000)
    path.write_bytes(whole)
    truth, harmless = told(path, store), 0
    for _ in range(count):
        path.write_bytes(mutated(rng, whole))
        found = told(path, store)
        if isinstance(found, GradstoreError):
            assert found.exit_code == 5
        else:
            harmless += 1
            np.testing.assert_array_equal(found, truth)
    silent = believed_without_a_digest(store, whole, path)
    control = f"surrogates without a digest: {silent} of 150 are evaluated as something else"
    what = "mutated surrogates"
    record("S10", what, injected=count, recovered=harmless, refused=count - harmless, silent=0, control=control)


def believed_without_a_digest(store: FeatureStore, whole: bytes, path: Path) -> int:
    """The control: the same mutations of a file as earlier versions wrote it."""
    rng, earlier, silent = np.random.default_rng(0), of_version_1(whole), 0
    path.write_bytes(earlier)
    truth = told(path, store)
    for _ in range(150):
        path.write_bytes(mutated(rng, earlier))
        found = told(path, store)
        silent += isinstance(found, np.ndarray) and not np.array_equal(found, truth)
    assert silent > 5
    return silent


def test_strange_values_under_a_right_digest(
    store: FeatureStore, whole: bytes, fast: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    rng, path, count, passed = np.random.default_rng(0), fast / "model", amount(150, 5000), 0
    header, tensors = header_of(whole), load(whole)
    spots, failures = [place for place in places(header) if place], 0
    for i in range(count):
        strange = with_strange_value(rng, header, [(), *spots])
        text = json.dumps(strange)
        path.write_bytes(save(tensors, metadata=under_digest("gradstore", text, tensors)))
        passed += isinstance(told(path, store), np.ndarray)
        failures += i < 100 and fails_without_checks(strange, tensors, store)
    assert failures > 5
    what, control = (
        "strange values in surrogates",
        f"fields not checked: {failures} of 100 end in an uncaught exception",
    )
    record("S10", what, injected=count, recovered=passed, refused=count - passed, silent=0, control=control)


def fails_without_checks(described: dict[str, Any], tensors: dict[str, np.ndarray], store: FeatureStore) -> bool:
    """The control: a header that is believed."""
    try:
        model = gs.KernelGLM(**described["settings"])
        for name, value in {**described["report"], "state_": None, "classes_": np.arange(3), **tensors}.items():
            setattr(model, name, value)
        model.binding_ = Binding(**described["binding"])
        with np.errstate(all="ignore"):
            gs.attribute(model, store, 0)
            model.logits(store)
    except GradstoreError:
        return False
    except Exception:
        return True
    return False


def without(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: Any) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.__setitem__(name, np.asarray(value))


TENSORS: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "no weights": without("coef_"),
    "no intercept": without("intercept_"),
    "no vectors": without("vectors_"),
    "weights that are not finite": put("coef_", np.full((3, 40), np.nan)),
    "weights of other classes": put("coef_", np.ones((2, 40))),
    "vectors of another length": put("vectors_", np.ones((3, 5))),
    "one axis": put("coef_", np.ones(120)),
    "integers": put("coef_", np.ones((3, 40), int)),
    "float16": put("intercept_", np.ones(3, np.float16)),
    "no classes": put("classes_", np.ones(0)),
    "the same classes": put("classes_", np.ones(3)),
    "classes in a table": put("classes_", np.ones((3, 1))),
    "another tensor": put("more", np.ones(3)),
    "a state that its kernel has not": put("state.weights", np.ones(3)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(name: str, whole: bytes, fast: Path, record: Record) -> None:
    tensors = dict(load(whole))
    TENSORS[name](tensors)
    text = json.dumps(header_of(whole))
    (fast / "model").write_bytes(save(tensors, metadata=under_digest("gradstore", text, tensors)))
    with pytest.raises(CorruptError, match="no surrogate, or a damaged one"):
        gs.KernelGLM.load(fast / "model")
    record("S10", "strange values in surrogates", injected=1, recovered=0, refused=1, silent=0,
           control="see strange values under a right digest")  # fmt: skip


def test_a_surrogate_of_an_earlier_version_is_read_with_a_note(
    store: FeatureStore, whole: bytes, fast: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (fast / "new").write_bytes(whole)
    shutil.copy(EARLIER, fast / "old")
    (fast / "made").write_bytes(of_version_1(whole))
    earlier = write_store(fast / "train", clustered(24, 2, 12))
    with caplog.at_level(logging.INFO, "gradstore"):
        gs.KernelGLM.load(fast / "new")
        assert not caplog.messages
        old = gs.KernelGLM.load(fast / "old")
    assert caplog.messages == [
        f"{fast / 'old'} is of an earlier version and has no digest, so damage to it would not be noticed"
    ]
    np.testing.assert_allclose(old.logits(earlier), gs.KernelGLM(alpha=0.1).fit(earlier).logits(earlier), atol=1e-3)
    np.testing.assert_array_equal(told(fast / "made", store), told(fast / "new", store))


def test_a_digest_that_was_taken_away_is_missed(whole: bytes, fast: Path) -> None:
    (fast / "model").write_bytes(save(load(whole), metadata={"gradstore": json.dumps(header_of(whole))}))
    with pytest.raises(CorruptError, match="its digest cannot be"):
        gs.KernelGLM.load(fast / "model")
