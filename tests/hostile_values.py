"""What an option or argument may be given that it was not made for, by what it takes."""

from __future__ import annotations

from collections.abc import Sequence

import click


def _words(text: str) -> list[str]:
    return text.split()


LONG = "x" * 5000
_HUGE = [digits * "9" for digits in (18, 19, 30, 400, 5000)]
TEXTS = [
    *_words("- nan inf 1e400 0 -1 None ../.. 💥 %s%n {0} ( [ * \\ ' cat auto AUTO größe→ [/red] [b] --"),
    *("", " ", "\n", "a\nb", "\0", "\x1b[31m", "\r", "\u202e", "\udcff", "a" * 300, LONG),
]
NUMBERS = [
    *_words("-1 0 1 2 7 -0 2147483648 4294967296 nan inf 1e3 1.5 0x10 1_0 ² ٣ 1e400"),
    *("", " 7 ", "\n", "\0", "\udcff", *_HUGE, "-" + _HUGE[2]),
]
BYTES = [
    *_words("1e400 nan inf -1 0 1 64KB 1MB AUTO Auto 2gb 1e-5 ٣GB 1e9999999 0.5 1.5GB 1e18 1e30TB ² KB"),
    *(" 2 GB ", "2 GB GB", "", "\n", "2GB\n", "\0", "\udcff", LONG, *_HUGE),
]
ROWS = [
    *_words("0:99999999999 99999999999 5,5 1:0 , 0, 0,1, -1 1: :3 :: 0:3:2 ٣ 0:3,2:5 0x1"),
    *_words("0:100000000 0:100000001 3,0:100000001"),
    *(" 0 ", "0 : 3", "0:" + _HUGE[2], "0,1," * 2000 + "0", *TEXTS),
]
DEVICES = [
    *_words("xpu mps meta cuda cuda:99 cuda:-1 cuda: cuda:0:0 cpu:0 cpu:7 CPU hpu vulkan hip fpga xla mkldnn"),
    *("privateuseone", *TEXTS),
]
ASSIGNMENTS = [
    *_words("n=0 n=-1 n=x n=1e3 seed=-1 x=1 = n label= label=[/red] nested.name=1 n=٣ n=99"),
    *("", "label=\n", "label=\udcff", "label=\x1b[31m", "label=" + LONG, "n=\0", "n= 7 ", "seed=" + _HUGE[2]),
    *("n=" + _HUGE[4],),
]
# Nothing here may name what is outside of the folder: commands that write put their files there.
OUTPUTS = [
    *_words(". train project.py loop [/red] größe→ project.py/x pipe/x /proc/nowhere/x missing/deep/x -"),
    *_words("out.npy out.safetensors out.h5 --"),
    *("", "\0", "a\nb", "\udcff", "\x1b[2J", "x" * 300, "x" * 250, "x/" * 3000),
]
INPUTS = [
    *_words("/ /dev/null /dev/zero /dev/full /proc/self/mem test train/store.json empty nowhere blank blank.npy ~"),
    *_words("pipe noise hostile.py noise.npy objects.npy many.npy fitted noise.h5 noise.safetensors ../.."),
    *OUTPUTS,
]
REFUSED = ["", "\0", "project.py", "project.py/x", "loop", "x" * 300, "x/" * 3000, "/proc/nowhere/x"]
"""Of outputs, those that no command takes."""

_BY_NAME = {"memory": BYTES, "rows": ROWS, "device": DEVICES, "options": ASSIGNMENTS}
_WRITTEN = ("out", "csv", "html", "file", "scratch", "path")
_COUNTS = ("batch_size", "alpha", "shape")


def values_of(parameter: click.Parameter) -> Sequence[str]:
    """Hostile values for a parameter of a command."""
    name, kind = parameter.name or "", parameter.type
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name == "directory":
        return REFUSED  # the demo takes a minute
    if isinstance(kind, click.Path):
        return OUTPUTS if name in _WRITTEN else INPUTS
    if isinstance(kind, click.Choice):
        return [*map(str, kind.choices), *TEXTS, str(kind.choices[0]).upper()]
    return NUMBERS if name in _COUNTS or isinstance(kind, click.types.IntParamType) else TEXTS
