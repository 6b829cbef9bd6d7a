"""Two projects with helpers of the same names in one process: each has its own code, whenever it imports it."""

from __future__ import annotations

import pickle
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gradstore as gs
from gradstore.model.project import Project, load_project


@pytest.fixture(autouse=True)
def no_folder_stays_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


PROJECT = """
import gradstore as gs
import torch
{imports}

def project():
    return gs.Project(model={model}, splits={{"train": {split}}})
"""
NET = """
import torch
from torch import nn
from scale import SCALE

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((2, 3), SCALE))

    def forward(self, x):
        return x @ self.w
"""
LAZY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        from scale import SCALE
        import deep.scale
        return x @ self.w * SCALE * deep.scale.ONE
"""
ROWS = "[(torch.ones(2), 0)]"


def write(folder: Path, scale: float, **files: str) -> Path:
    """A project file and its helpers; `deep/a.py` is written deep__a."""
    helpers = {"scale": f"SCALE = {scale}\n", "deep____init__": "", "deep__scale": "ONE = 1.0\n", **files}
    for name, text in helpers.items():
        path = folder / f"{name.replace('__', '/', 1)}.py" if "__" in name else folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "project.py"


def outcome(project: Project) -> float:
    """What the model says of ones: twice the scale."""
    return project.prepare().logits(torch.ones(1, 2))[0, 0].item()


KINDS = {
    "module": {"project": PROJECT.format(imports="from net import Net", model="Net()", split=ROWS), "net": NET},
    "helper of a helper": {
        "project": PROJECT.format(imports="import outer", model="outer.net.Net()", split=ROWS),
        "outer": "import net\n",
        "net": NET,
    },
    "package": {
        "project": PROJECT.format(imports="import models", model="models.Net()", split=ROWS),
        "models____init__": "from .net import Net\n",
        "models__net": NET.replace("from scale", "from .scale"),
        "models__scale": "from scale import SCALE\n",
    },
    "in project()": {
        "project": PROJECT.format(imports="", model="__import__('net').Net()", split=ROWS).replace(
            "    return", "    import net\n    return"
        ),
        "net": NET,
    },
    "in forward": {"project": PROJECT.format(imports="from net import Net", model="Net()", split=ROWS), "net": LAZY},
    "named as a package that is installed": {
        "project": PROJECT.format(imports="from yaml import Net", model="Net()", split=ROWS),
        "yaml": NET,
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(1.0, 3.0), (3.0, 1.0)])
def test_each_project_has_its_own_helpers(kind: str, order: tuple[float, float], tmp_path: Path) -> None:
    before = set(sys.modules)
    files = [write(tmp_path / f"of{scale:.0f}", scale, **KINDS[kind]) for scale in order]
    projects = [load_project(file) for file in files]
    assert [outcome(project) for project in projects] == [2 * scale for scale in order]
    assert [outcome(project) for project in reversed(projects)] == [2 * scale for scale in reversed(order)]
    assert sys.meta_path[0].__class__.__name__ != "OwnModules"
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("net", "scale", "deep", "models", "outer", "yaml"):
            del sys.modules[name]


def test_python_alone_would_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what projects did when their folders were put on the path and nothing else."""
    found = []
    for scale in (1.0, 3.0):
        write(tmp_path / f"of{scale:.0f}", scale, lonely=f"SCALE = {scale}\n")
        monkeypatch.syspath_prepend(tmp_path / f"of{scale:.0f}")
        found.append(__import__("lonely").SCALE)
    monkeypatch.delitem(sys.modules, "lonely")
    assert found == [1.0, 1.0]


def test_rows_that_import_as_they_are_read(tmp_path: Path) -> None:
    rows = """
import torch
class Rows:
    def __len__(self):
        return 1
    def __getitem__(self, row):
        from scale import SCALE
        return torch.full((2,), SCALE), 0
"""
    text = PROJECT.format(
        imports="from rows import Rows\nfrom torch import nn", model="nn.Linear(2, 3)", split="Rows()"
    )
    projects = [load_project(write(tmp_path / f"{s:.0f}", s, project=text, rows=rows)) for s in (1.0, 3.0)]
    for project, scale in zip(projects, (1.0, 3.0), strict=True):
        assert project.examples("train").read(range(1))[0].tolist() == [[scale, scale]]
        assert isinstance(gs.load_project(tmp_path / f"{scale:.0f}" / "project.py"), Project)


def test_a_program_keeps_its_own_module_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ModuleType("net")
    monkeypatch.setitem(sys.modules, "net", ours)
    project = load_project(write(tmp_path, 3.0, **KINDS["in forward"]))
    assert outcome(project) == 6.0
    assert sys.modules["net"] is ours


def test_a_helper_that_is_edited_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, 1.0, **KINDS["module"])
    first = load_project(file)
    (tmp_path / "scale.py").write_text("SCALE = 3.0\n")  # of the same second and length
    assert [outcome(first), outcome(load_project(file))] == [2.0, 6.0]


def test_the_standard_library_stays_itself(tmp_path: Path) -> None:
    import types

    write(tmp_path, 1.0, types="x = 1\n", **KINDS["module"])
    assert outcome(load_project(tmp_path / "project.py")) == 2.0
    assert sys.modules["types"] is types


def test_what_the_last_project_defines_can_be_pickled(tmp_path: Path) -> None:
    record = "from dataclasses import dataclass\n@dataclass\nclass Record:\n    x: int = 1\n"
    text = PROJECT.format(
        imports="from records import Record\nfrom torch import nn", model="nn.Linear(2, 3)", split=ROWS
    )
    text = text.replace("splits=", 'classes=[Record(), "b", "c"], splits=')
    load_project(write(tmp_path / "a", 1.0, project=text, records=record))
    project = load_project(write(tmp_path / "b", 1.0, project=text, records=record))
    assert project.classes is not None
    assert pickle.loads(pickle.dumps(project.classes[0])) == project.classes[0]


def test_threads_import_their_own(tmp_path: Path) -> None:
    projects = {s: load_project(write(tmp_path / f"{s:.0f}", s, **KINDS["in forward"])) for s in (1.0, 3.0)}
    wrong: list[float] = []

    def work(scale: float) -> None:
        for _ in range(50):
            found = projects[scale].model(torch.ones(1, 2))[0, 0].item()
            if found != 2 * scale:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1.0, 3.0, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
