"""Machine code of the fused CUDA projection: tensor-core instructions, registers, spills. Needs no GPU.

    python benchmarks/sass.py [--rows 640] [--architectures sm_80 sm_90a sm_100] [--dump FOLDER]

Compiles every variant with NVRTC and prints the assembler's report. With nvdisasm (pip install nvidia-cuda-nvdisasm) it
counts instructions too. Exits with 1 if the product spills, has no tensor-core instruction, or its wgmma instructions
are serialised.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from gradstore.projection.cuda import PRECISIONS, cuda_source
from gradstore.projection.cuda.geometry import variant_for

TENSOR = {True: "HGMMA", False: "HMMA"}
COUNTED = ("HGMMA", "HMMA", "LDSM", "IMAD.WIDE", "LOP3", "MUFU", "SHFL", "STL", "LDL", "BAR")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--architectures", nargs="+", default=["sm_80", "sm_90a", "sm_100"])
    parser.add_argument("--dump", type=Path, help="folder for .cubin and .sass files")
    options = parser.parse_args()
    faults = []
    for architecture in options.architectures:
        for kind in ("rademacher", "gaussian"):
            for precision in PRECISIONS:
                faults += inspect(architecture, kind, precision, options.rows, options.dump)
    for fault in faults:
        print("FAULT", fault)
    sys.exit(bool(faults))


def inspect(architecture: str, kind: str, precision: str, rows: int, dump: Path | None) -> list[str]:
    """Print one variant; returns what is wrong with it."""
    variant = variant_for(kind, precision, rows, architecture == "sm_90a")
    report = io.StringIO()
    code = cuda_source.compile_source(cuda_source.source_of(variant), architecture, report)
    notes = report.getvalue().replace("\0", "")
    own = notes[notes.index(f"entry function '{cuda_source.ENTRY}'") :]
    registers, spilled = re.search(r"Used (\d+) registers", own)[1], re.search(r"(\d+) bytes spill stores", own)[1]
    name = f"{architecture} {kind} {precision} {variant.rows}"
    counts = count(code, name.replace(" ", "-"), dump)
    shown = "  ".join(f"{key} {value}" for key, value in counts.items() if value)
    print(f"{name:34} registers {registers}  spilled {spilled}  {shown}", flush=True)
    faults = [] if spilled == "0" else [f"{name}: {spilled} bytes spilled"]
    if "Potential Performance Loss" in notes:
        faults.append(f"{name}: wgmma is serialised")
    if counts and not counts[TENSOR[variant.hopper]]:
        faults.append(f"{name}: no {TENSOR[variant.hopper]}")
    return faults


def count(code: bytes, name: str, dump: Path | None) -> dict[str, int]:
    """Instructions of the product, if there is a disassembler; kept in `dump`, if it is given."""
    beside = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    tool = shutil.which("nvdisasm") or (str(beside) if beside.exists() else None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = dump or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.cubin"
        file.write_bytes(code)
        if tool is None:
            return {}
        text = subprocess.run([tool, "-c", str(file)], capture_output=True, text=True, check=True).stdout
        file.with_suffix(".sass").write_text(text)
    product = text[text.index(f".text.{cuda_source.ENTRY}:") :]
    following = product.find("\n.text.", 1)
    body = product[: following if following > 0 else None]
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", body)
    return {key: sum(word.startswith(key) for word in instructions) for key in COUNTED}


if __name__ == "__main__":
    main()
