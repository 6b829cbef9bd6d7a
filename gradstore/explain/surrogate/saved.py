"""A fitted surrogate on disk: one safetensors file, its settings and binding as JSON in the header, under a digest.

Version 1 of the format had no digest; its files are read, and a note says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import CorruptError
from gradstore.explain.surrogate.binding import KINDS, Binding
from gradstore.explain.surrogate.fit_settings import BACKENDS
from gradstore.explain.surrogate.saved_file import require_surrogate
from gradstore.kernels.definitions import PROJECTED
from gradstore.store.files.output import write_output
from gradstore.store.files.tensor_file import TensorFile, plain_json, read_tensors, under_digest
from gradstore.store.files.tensor_header import tensor_pieces

_log = logging.getLogger(__name__)

FORMAT = "gradstore-surrogate"
VERSION = 2
_STATE = "state."  # begins the names of what the kernel's feature map fitted
_TENSORS = ("coef_", "intercept_", "vectors_", "classes_")
_REPORT: dict[str, tuple[type, ...]] = {
    "alpha_": (int, float),
    "n_iter_": (int,),
    "loss_": (int, float),
    "converged_": (bool,),
    "reason_": (str,),
    "logit_error_": (str,),
    "n_features_in_": (int,),
}
_MOST_BYTES = 64 << 30
_LONGEST_PATH = 4096


def save_fitted(model: Any, path: Path) -> Path:
    """Write a fitted `KernelGLM`; a reader sees the old file or the new."""
    tensors = {name: np.ascontiguousarray(getattr(model, name)) for name in _TENSORS if _kept(model, name)}
    tensors |= {_STATE + name: np.ascontiguousarray(value) for name, value in (model.state_ or {}).items()}
    described = {
        "format": FORMAT,
        "version": VERSION,
        "settings": {**model.get_params(), "scratch": None},
        "report": {name: getattr(model, name) for name in _REPORT},
        "alpha_scores": [[alpha, score] for alpha, score in model.alpha_scores_.items()],
        "binding": vars(model.binding_),
        "classes": None if "classes_" in tensors else model.classes_.tolist(),
    }
    described["report"]["logit_error_"] = repr(model.logit_error_)
    pieces = tensor_pieces(tensors, under_digest("gradstore", json.dumps(described), tensors))
    return write_output(path, pieces).absolute()


def load_fitted(cls: type, path: Path) -> Any:
    """Read a `KernelGLM` back; see `KernelGLM.load`."""
    require_surrogate(path)
    try:
        found = read_tensors(path.absolute(), "gradstore", _MOST_BYTES)
    except (ValueError, MemoryError) as error:
        raise _damaged(path, error) from error
    try:
        described = plain_json(found.text)
        _require_format(described, found, path)
        model = _model(cls, described, found.arrays)
        _require_shapes(model)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(path, error) from error
    if not found.sealed:
        _log.warning("%s is of an earlier version and has no digest, so damage to it would not be noticed", path)
    return model


def _model(cls: type, described: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """The surrogate that a header and its tensors describe, whose every value is of its kind."""
    report, settings = described["report"], described["settings"]
    _require(set(settings) == set(cls().get_params()), "its settings")
    _require(isinstance(settings["kernel"], str) and settings["backend"] in BACKENDS, "its kernel and backend")
    _require(type(settings["memory"]) in (int, str) and settings["scratch"] is None, "its memory")
    _require(set(report) == set(_REPORT), "its report")
    model = cls(**settings)
    for name, kinds in _REPORT.items():
        _require(type(report[name]) in kinds, f"its {name}")
        setattr(model, name, report[name])
    model.logit_error_ = float(report["logit_error_"])
    model.alpha_scores_ = {float(alpha): float(score) for alpha, score in described["alpha_scores"]}
    model.binding_ = _binding(described["binding"])
    for name in _TENSORS:
        setattr(model, name, tensors.get(name))
    state = {name.removeprefix(_STATE): value for name, value in tensors.items() if name.startswith(_STATE)}
    _require(set(tensors) <= {*_TENSORS, *(_STATE + name for name in state)}, "its tensors")
    kernel = PROJECTED.get(model.kernel)
    _require(bool(state) == (kernel is not None and kernel.fit is not None), "what its kernel was fitted to")
    _require(model.binding_.kind != "store" or kernel is not None, "its kernel")
    model.state_ = state or None
    if model.classes_ is None:
        model.classes_ = np.array(described["classes"])
    return model


def _binding(said: Any) -> Binding:
    found = Binding(**said)
    sources = found.source if isinstance(found.source, list) else [found.source]
    identity = found.identity
    _require(found.kind in KINDS and all(isinstance(source, str) for source in sources), "what it is bound to")
    _require(not any("\0" in source or len(source.encode()) > _LONGEST_PATH for source in sources), "its source")
    _require(isinstance(identity, dict) or (identity is None and found.kind == "array"), "what it is bound to")
    if found.kind == "gram":
        _require(isinstance(found.source, str) and isinstance((identity or {}).get("data_a"), str), "its matrix")
    return found


def _kept(model: Any, name: str) -> bool:
    value = getattr(model, name)
    return value is not None and np.asarray(value).dtype.kind in "fiub"


def _require_format(found: Any, file: TensorFile, path: Path) -> None:
    """The file is a surrogate of a version that is known: the first had no digest, and no other may be without."""
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") not in (1, VERSION):
        got = (
            f"{found.get('format')!s:.40} {found.get('version')!s:.20}" if isinstance(found, dict) else "something else"
        )
        raise CorruptError(
            "this is no surrogate that is known", where=path, expected=f"{FORMAT} 1 or {VERSION}", got=got
        )
    _require(file.sealed == (found["version"] != 1), "its digest")


def _require_shapes(model: Any) -> None:
    c = len(model.classes_)
    _require(model.classes_.ndim == 1 and model.classes_.dtype.kind in "fiubU", "its classes")
    _require(c >= 2 and len(np.unique(model.classes_)) == c, "its classes")
    _require(model.coef_ is not None and model.intercept_ is not None, "its weights")
    _require(model.coef_.ndim == 2 and len(model.coef_) == c and model.intercept_.shape == (c,), "its weights")
    _require(model.vectors_ is None or model.vectors_.shape == (c, model.n_features_in_), "its vectors")
    _require(model.vectors_ is not None or model.coef_.shape[1] == model.n_features_in_, "its weights")
    _require(model.vectors_ is not None or model.binding_.kind != "store", "its vectors")
    for values in (model.coef_, model.intercept_, model.vectors_):
        _require(values is None or (values.dtype == np.float64 and bool(np.isfinite(values).all())), "its weights")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} cannot be")


def _damaged(path: Path, error: Exception) -> CorruptError:
    lines = str(error).splitlines()
    got = lines[0][:120] if lines else type(error).__name__
    return CorruptError(
        "this is no surrogate, or a damaged one", where=path, got=got, hint="Fit it again: `gradstore fit`"
    )
