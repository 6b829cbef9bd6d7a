"""`gradstore fit`, `attribute` and `evaluate` as a user types them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from gradstore_cli import main
from synthetic import clustered, write_store

import gradstore as gs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    features, rng = clustered(90, 3, 16, seed=4), np.random.default_rng(0)
    logits = features.reshape(90, -1) @ rng.standard_normal((48, 3)) * 3
    for name, rows in (("train", slice(0, 60)), ("test", slice(60, 90))):
        write_store(folder / name, features[rows], logits=logits[rows], names=("cat", "dog", "owl"))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, handler)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_fit_attribute_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "s.safetensors"
    code, out, err = run(capsys, "fit", folder / "train", "--out", file, "--alpha", "1e-3", "--json")
    assert (code, json.loads(out)["converged"]) == (0, True)
    assert f"wrote {file}" in err
    model, test = gs.KernelGLM.load(file), gs.open(folder / "test")

    code, out, _ = run(capsys, "attribute", file, folder / "test", "--row", 2, "-k", 3, "--json")
    record = json.loads(out)
    assert code == 0
    np.testing.assert_allclose(list(record["logits"].values()), model.decision_function(test)[2], atol=1e-6)
    asked = ("--class", "owl", "--rather-than", "cat")
    code, out, _ = run(capsys, "attribute", file, folder / "test", "--row", 2, *asked)
    assert code == 0
    assert "why owl rather than cat" in out
    train = gs.open(folder / "train")
    listed = [*record["contributors"], *record["opponents"]]
    assert [item["label"] for item in listed] == [train.classes[train.labels[item["row"]]] for item in listed]
    assert record["sum"] == pytest.approx(record["logits"][record["class"]], abs=1e-5)

    code, out, _ = run(capsys, "attribute", file, folder / "test", "--rows", "5,2", "-k", 3, "--json")
    assert code == 0
    assert [found["row"] for found in json.loads(out)] == [5, 2]
    assert json.loads(out)[1] == record
    code, out, _ = run(capsys, "attribute", file, folder / "test", "--rows", "5,2", *asked)
    assert code == 0
    assert [line.split()[2] for line in out.splitlines() if line.startswith("query row")] == ["5,", "2,"]

    code, out, _ = run(capsys, "evaluate", file, folder / "test", "--bootstrap", 20, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["tau"]["value"] == gs.evaluate(model, test, bootstrap=0).tau.value
    assert [curve["name"] for curve in found["linearisations"]] == ["phi1", "phi2", "phi3"]
    code, out, _ = run(capsys, "evaluate", file, folder / "test", "--bootstrap", 5)
    assert code == 0
    assert "r_miss" in out
    code, out, _ = run(capsys, "fit", folder / "train", "--out", file, "--alpha", "auto")
    assert code == 0
    assert out.count("chosen") == 1
    assert "τ on rows held out" in out


def test_errors_have_their_exit_codes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s"
    assert run(capsys, "fit", folder / "train", "--out", file, "--alpha", "weak")[0] == 2
    assert run(capsys, "fit", folder / "train", "--out", file, "--alpha", "1e-2")[0] == 0
    other = tmp_path / "other"
    write_store(other, clustered(5, 3, 16), dtype="int8", names=("cat", "dog", "owl"))
    code, _, err = run(capsys, "evaluate", file, other)
    assert code == 4
    assert "differ in 1 field" in err
    code, _, err = run(capsys, "attribute", file, folder / "test", "--row", 0, "--class", "fox")
    assert (code, "expected one of cat, dog, owl" in err) == (2, True)
    assert run(capsys, "attribute", tmp_path / "none", folder / "test", "--row", 0)[0] == 2
    for rows in ((), ("--row", 0, "--rows", "1:3")):
        code, _, err = run(capsys, "attribute", file, folder / "test", *rows)
        assert (code, "give either --row or --rows" in err) == (2, True)
