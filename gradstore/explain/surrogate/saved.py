"""A fitted surrogate on disk: one safetensors file, its settings and binding as JSON in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from gradstore.errors import CorruptError, UsageError
from gradstore.explain.surrogate.binding import Binding
from gradstore.store.files.disk import Disk, MissingFileError
from gradstore.store.files.output import write_output

FORMAT = "gradstore-surrogate"
VERSION = 1
_STATE = "state."  # begins the names of what the kernel's feature map fitted
_TENSORS = ("coef_", "intercept_", "vectors_", "classes_")
_REPORT = ("alpha_", "n_iter_", "loss_", "converged_", "reason_", "logit_error_", "n_features_in_")
_MOST_BYTES = 64 << 30


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
    return write_output(path, [serialise(tensors, metadata={"gradstore": json.dumps(described)})]).absolute()


def load_fitted(cls: type, path: Path) -> Any:
    """Read a `KernelGLM` back; see `KernelGLM.load`."""
    try:
        data = Disk().read_file(path.absolute(), _MOST_BYTES)
    except MissingFileError as error:
        raise UsageError("there is no surrogate", where=path, hint="`gradstore fit` writes one") from error
    described = _header(data, path)
    try:
        tensors = parse(data)
        model = cls(**described["settings"])
        for name, value in described["report"].items():
            setattr(model, name, value)
        model.logit_error_ = float(described["report"]["logit_error_"])
        model.alpha_scores_ = {float(alpha): float(score) for alpha, score in described["alpha_scores"]}
        model.binding_ = Binding(**described["binding"])
        for name in _TENSORS:
            setattr(model, name, tensors.get(name))
        state = {name.removeprefix(_STATE): value for name, value in tensors.items() if name.startswith(_STATE)}
        model.state_ = state or None
        if model.classes_ is None:
            model.classes_ = np.array(described["classes"])
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise CorruptError("the surrogate is damaged", where=path, got=str(error).splitlines()[0]) from error
    _require_shapes(model, path)
    return model


def _kept(model: Any, name: str) -> bool:
    value = getattr(model, name)
    return value is not None and np.asarray(value).dtype.kind in "fiub"


def _header(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON in the header, of a file that is one of ours."""
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    found: Any = None
    if 0 < size <= len(data) - 8:
        try:
            found = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["gradstore"])
        except (ValueError, KeyError, TypeError, RecursionError):
            found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        got = f"{found.get('format')} {found.get('version')}" if isinstance(found, dict) else "something else"
        raise UsageError("this is not a surrogate", where=path, expected=f"{FORMAT} {VERSION}", got=got)
    return found


def _require_shapes(model: Any, path: Path) -> None:
    c = len(model.classes_)
    good = (
        model.coef_ is not None
        and model.intercept_ is not None
        and model.coef_.ndim == 2
        and model.coef_.shape[0] == c
        and model.intercept_.shape == (c,)
        and (model.vectors_ is None or model.vectors_.shape == (c, model.n_features_in_))
        and all(np.isfinite(v).all() for v in (model.coef_, model.intercept_, model.vectors_) if v is not None)
    )
    if not good:
        raise CorruptError("the surrogate is damaged", where=path, expected=f"finite weights of {c} classes")
