"""Featurize in a terminal: its bar, at any width, whatever the user has set."""

from __future__ import annotations

import re

import pytest
from terminal import SCREENS, in_terminal
from test_cli import PROJECT


@pytest.mark.parametrize(("columns", "more"), SCREENS)
def test_featurize_draws_its_bar_and_ends(columns, more, tmp_path):
    (tmp_path / "project.py").write_text(PROJECT)
    command = ("featurize", "project.py", "--split", "train", "--out", "store", "--proj-dim", "256")
    screen = in_terminal(tmp_path, *command, columns=columns, **more)
    assert screen.went_well, screen.text
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.text)
    if columns >= 80:
        assert "48/48 rows" in shown
    again = in_terminal(tmp_path, *command, columns=columns, **more)
    assert again.went_well, again.text
    assert "was finished before" in again.text
