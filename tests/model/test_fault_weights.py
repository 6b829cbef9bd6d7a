"""S13: hostile checkpoints get one line and the right status; none ends in another exception, or as other weights."""

from __future__ import annotations

import io
import json
import os
import pickle
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Record
from mutations import mutated
from safetensors.torch import save as safetensors
from torch import nn

from gradstore.errors import CorruptError, GradstoreError, ProjectError, UnsafeError
from gradstore.model.weights import load_weights

pytestmark = pytest.mark.soak

CONTROL = (
    "torch.load and load_state_dict alone: complex weights lose their imaginary part, sparse ones end in a RuntimeError"
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))


def saved(content: Any, *, archive: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


STATE = network().state_dict()
WHOLE: dict[str, bytes] = {
    "archive.pt": saved(STATE),
    "legacy.pt": saved(STATE, archive=False),
    "w.safetensors": safetensors(dict(STATE)),
}


def outcome(path: Path, model: nn.Module) -> GradstoreError | None:
    """The one line in which a checkpoint is refused; None where it is loaded."""
    try:
        load_weights(model, path)
    except GradstoreError as error:
        return error
    return None


@pytest.mark.parametrize("name", WHOLE)
def test_mutated_checkpoints(name: str, fast: Path, amount: Callable[[int, int], int], record: Record) -> None:
    rng, loaded, model = np.random.default_rng(0), 0, network()
    count = amount(1000, 30_000) if name == "w.safetensors" else amount(300, 10_000)  # which takes six times as long
    for _ in range(count):
        (fast / name).write_bytes(mutated(rng, WHOLE[name]))
        error = outcome(fast / name, model)
        loaded += error is None  # a flipped bit of a weight is within what a weight may be
        if error is not None:
            assert error.exit_code in (3, 5, 9), error.line
            assert "\n" not in error.line
            assert len(error.line) < 1000
    record(
        "S13",
        "hostile checkpoints",
        injected=count,
        recovered=loaded,
        refused=count - loaded,
        silent=0,
        control=CONTROL,
    )


def with_weight(value: Any) -> dict[str, Any]:
    return {**STATE, "0.weight": value}


def deep(depth: int) -> bytes:
    """A pickle of a list within a list within a list."""
    return pickle.PROTO + b"\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


with warnings.catch_warnings():  # of formats in beta state
    warnings.simplefilter("ignore")
    ODD = {
        "compressed sparse": STATE["0.weight"].to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(STATE["0.weight"], 0.1, 0, torch.qint8),
    }

UNFIT: dict[str, Any] = {
    **{name: with_weight(value) for name, value in ODD.items()},
    "sparse": with_weight(STATE["0.weight"].to_sparse()),
    "meta": with_weight(torch.empty(3, 4, device="meta")),
    "complex": with_weight(STATE["0.weight"] * 1j),
    "float for an integer": {**STATE, "1.num_batches_tracked": torch.tensor(1.5)},
    "expanded": with_weight(torch.ones(1).expand(1 << 40)),
    "scalar": with_weight(torch.tensor(1.0)),
    "empty": with_weight(torch.empty(0)),
    "numbers": with_weight(3.0),
    "text": with_weight("x"),
    "names that are numbers": {3: torch.ones(3)},
    "names that are lists": {(1, 2): torch.ones(3), **STATE},
    "a long name": {**STATE, "x" * 100_000: torch.ones(1)},
    "a name of two lines": {**STATE, "x\ny": torch.ones(1)},
    "a list": [1, 2],
    "a number": 3,
    "nothing": {},
    "two of them": {"student": STATE, "teacher": STATE},
    "one within one within one": {"state_dict": {"model": STATE}},
    "an ordered one without names": OrderedDict({None: torch.ones(1)}),
}


@pytest.mark.parametrize("name", UNFIT)
def test_good_files_that_do_not_fit_are_of_status_3(name: str, fast: Path, record: Record) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (fast / "w.pt").write_bytes(saved(UNFIT[name]))
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error = outcome(fast / "w.pt", model)
    assert isinstance(error, ProjectError), error
    assert "\n" not in error.line
    assert len(error.line) < 1000
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    record("S13", "hostile checkpoints", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


def compressed(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return file.getvalue()


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


MALFORMED: dict[str, tuple[str, bytes]] = {
    "empty": ("w.pt", b""),
    "text": ("w.pt", b"hello"),
    "empty safetensors": ("w.safetensors", b""),
    "a header without end": ("w.safetensors", (1 << 62).to_bytes(8, "little")),
    "a deep header": ("w.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000),
    "another dtype": ("w.safetensors", header(a={"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}) + bytes(4)),
    "infinite shapes": ("w.safetensors", header(a={"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]})),
    "no numbers": ("w.safetensors", header(a={"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 4]})),
    "a pickle in a safetensors file": ("w.safetensors", WHOLE["archive.pt"]),
    "a safetensors file in a pickle": ("w.pt", WHOLE["w.safetensors"]),
    "deep lists": ("w.pt", deep(50_000)),
    "compressed": ("w.pt", compressed(saved({"0.weight": torch.zeros(1 << 20)}))),
    "an empty archive": ("w.pt", b"PK\x05\x06" + bytes(18)),
    "a pickle of nothing": ("w.pt", pickle.dumps(None)),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_of_status_5_or_9(name: str, fast: Path, record: Record) -> None:
    file, content = MALFORMED[name]
    (fast / file).write_bytes(content)
    error = outcome(fast / file, network())
    assert isinstance(error, (CorruptError, UnsafeError)), error
    assert "\n" not in error.line
    record("S13", "hostile checkpoints", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


def test_a_compressed_checkpoint_takes_no_memory(fast: Path) -> None:
    (fast / "w.pt").write_bytes(compressed(saved({"0.weight": torch.zeros(1 << 24)})))
    tracemalloc.start()
    with pytest.raises(UnsafeError, match=r"compressed, so loading it could take any amount of memory .*got 671"):
        load_weights(network(), fast / "w.pt")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused(make: Callable[[Path], object], name: str, fast: Path, record: Record) -> None:
    make(fast / name)
    with pytest.raises(ProjectError, match="the weights file does not exist"):
        load_weights(network(), fast / name)
    record("S13", "hostile checkpoints", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


@pytest.mark.parametrize("name", WHOLE)
def test_a_link_to_good_weights_is_followed(name: str, fast: Path) -> None:
    """Caches of weights are full of links."""
    (fast / "file").write_bytes(WHOLE[name])
    (fast / name).symlink_to("file")
    assert outcome(fast / name, network()) is None


def test_what_torch_alone_does_with_such_files(fast: Path) -> None:
    """The control: one takes the real part without an error, the other ends in an exception that says nothing."""
    model = network()
    with pytest.warns(UserWarning, match="discards the imaginary part"):
        model.load_state_dict(UNFIT["complex"])
    with pytest.raises(RuntimeError, match="While copying the parameter"):
        model.load_state_dict(UNFIT["sparse"])
