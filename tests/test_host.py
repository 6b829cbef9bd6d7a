"""Whatever runs, the process it runs in is left as it was: threads, random states, switches of torch, the model."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import sklearn.linear_model  # noqa: F401  # draws random numbers and adds a filter of warnings when it is imported
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.machine.threads import Workers, one_torch_thread, single_threaded

Host = dict[str, object]


def mkl_threads() -> int | None:
    """How many threads MKL would use in this thread; None where torch was not built with it."""
    library = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
    count = getattr(library, "mkl_serv_get_max_threads", None)
    return count and count()


def threads() -> Host:
    with ThreadPoolExecutor(1) as pool:  # a new thread takes what was set last, in whatever thread
        later = pool.submit(lambda: (torch.get_num_threads(), mkl_threads())).result()
    limits = sorted({(library["prefix"], library["num_threads"]) for library in threadpool_info()})
    return {"here": (torch.get_num_threads(), mkl_threads()), "in a new thread": later, "libraries": limits}


def host(model: nn.Module) -> Host:
    state = np.random.get_state(legacy=False)
    return {
        **threads(),
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "NumPy's random state": (state["state"]["key"].tobytes(), state["state"]["pos"]),
        "Python's random state": random.getstate(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.deterministic),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, torch.get_default_dtype()),
        "precision by newer names": [
            getattr(where, "fp32_precision", None)
            for where in (torch.backends, torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda.matmul)
        ],
        "cuDNN": [
            getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
        ],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "place": (Path.cwd(), dict(os.environ), list(sys.path), list(warnings.filters)),
        "model": [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        "parameters": [(n, p.requires_grad, p.grad, p.detach().numpy().tobytes()) for n, p in model.named_parameters()],
    }


def make_project() -> gs.Project:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(90, 6, generator=generator), torch.arange(90) % 3
    splits = {"train": TensorDataset(x[:80], y[:80]), "test": TensorDataset(x[80:], y[80:])}
    return gs.Project(model=model, splits=splits, poisoned={"train": range(0, 80, 2)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[gs.Project, gs.Rows, gs.Rows]:
    project, folder = make_project(), tmp_path_factory.mktemp("stores")
    return (project, *(gs.featurize(project, split=s, out=folder / s, proj_dim=64) for s in ("train", "test")))


ACTIONS: dict[str, Callable[[gs.Project, gs.Rows, gs.Rows, Path], object]] = {
    "featurize": lambda p, a, b, out: gs.featurize(p, split="train", out=out / "a", proj_dim=64),
    "featurize, two processes": lambda p, a, b, out: gs.featurize(p, split="train", out=out / "b", workers=2),
    "featurize queries": lambda p, a, b, out: gs.featurize_queries(p, a, split="test"),
    "topk": lambda p, a, b, out: gs.topk(a, b, 3),
    "topk float32": lambda p, a, b, out: gs.topk(a, b, 3, engine="float32"),
    "topk certified": lambda p, a, b, out: gs.topk(a, b, 3, mode="certified"),
    "topk approx": lambda p, a, b, out: gs.topk(a, b, 3, mode="approx"),
    "session": lambda p, a, b, out: gs.Session(a).topk(b, 3),
    "gram": lambda p, a, b, out: gs.gram(a, b, out=out / "gram.h5"),
    "gram, one tile": lambda p, a, b, out: next(gs.gram(a, b)),
    "gram int8": lambda p, a, b, out: gs.gram(a, b, arithmetic="int8", out=out / "gram.h5"),
    "exact gram": lambda p, a, b, out: gs.exact_gram(p, "train", "test"),
    "residual": lambda p, a, b, out: gs.residual(p, a, b, pairs=50),
    "forensics": lambda p, a, b, out: gs.forensics(a, b, votes=1),
    "surrogate": lambda p, a, b, out: gs.evaluate(gs.KernelGLM(alpha=1e-2).fit(a), b, bootstrap=3),
    "attribute": lambda p, a, b, out: gs.attribute(gs.KernelGLM(alpha=1e-2).fit(a), b, 0),
    "concat": lambda p, a, b, out: gs.topk(gs.concat([a, b]), b, 3),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_the_host_is_left_as_it_was(made: tuple[gs.Project, gs.Rows, gs.Rows], action: str, tmp_path: Path) -> None:
    project, train, test = made
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(2)
        before = host(project.model)
        ACTIONS[action](project, train, test, tmp_path)
        after = host(project.model)
    assert {name: (was, after[name]) for name, was in before.items() if was != after[name]} == {}


@pytest.mark.parametrize("context", [one_torch_thread, single_threaded, Workers])
def test_a_failure_leaves_the_host_as_it_was(context: Callable[[], AbstractContextManager[Workers | None]]) -> None:
    def fail() -> None:
        with context() as workers:
            inside = workers.map(lambda _: (torch.get_num_threads(), mkl_threads()), range(9)) if workers else []
            assert {*inside, *([] if workers else [(torch.get_num_threads(), mkl_threads())])} <= {(1, 1), (1, None)}
            raise ZeroDivisionError

    torch.set_num_threads(2)
    before = threads()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert threads() == before


def test_a_limit_that_holds_for_torch_too_is_noticed() -> None:
    """The control: the order in which `single_threaded` once took its two limits left MKL with one thread."""
    if mkl_threads() is None:
        pytest.skip("torch was built without MKL")
    torch.set_num_threads(2)
    before = threads()
    with threadpool_limits(1), one_torch_thread():
        pass
    assert threads() != before
    torch.set_num_threads(2)
    assert threads() == before
