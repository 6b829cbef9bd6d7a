"""What a model's state costs to keep: nothing that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_torchs_compiler_is_not_imported_where_nothing_is_compiled(tmp_path: Path) -> None:
    """It takes two seconds."""
    code = (
        "import sys, torch, gradstore as gs\n"
        "data = torch.utils.data.TensorDataset(torch.randn(5, 3), torch.arange(5) % 2)\n"
        "project = gs.Project(model=torch.nn.Linear(3, 2), splits={'train': data})\n"
        "gs.featurize(project, split='train', out='store', proj_dim=8)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
