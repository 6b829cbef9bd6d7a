"""The stages of `bench_cuda.py`, each run as ``python cuda_stages.py STAGE FOLDER``."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cuda_checks import sanitizer, tests
from cuda_pieces import pieces, sjlt
from cuda_runs import ends, profile
from cuda_timing import SEED, K, P, Recorder, fastest, finish, product_of, random_block, timed

from gradstore.projection import cuda, self_check
from gradstore.projection.cuda import cuda_source
from gradstore.projection.cuda.geometry import variant_for
from gradstore.projection.device_paths import PATHS, Accumulate
from gradstore.projection.entries import Entries
from gradstore.projection.kinds import KINDS

SLAB = 32768
PACKAGES = ("torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "numpy", "h5py", "pytest")


def facts(record: Recorder) -> None:
    """Versions, why a path cannot be had, the ceiling."""
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    print(torch.cuda.get_device_properties(0))
    for path in PATHS:
        kinds = [kind for kind in KINDS if path.suits(0, kind)]
        why = path.missing(0) if kinds else "not for this device"
        print(f"{path.name}: {why or 'can be had'}")
    carried = set(os.listdir(cuda_source.cache_folder())) if cuda_source.cache_folder().exists() else set()
    began = time.perf_counter()
    cuda_source.cubin(variant_for("rademacher", "fast", 640, True), "sm_90a")
    new = set(os.listdir(cuda_source.cache_folder())) - carried
    record("first variant's code", time.perf_counter() - began, "s", note="compiled" if new else "from the cache")
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = timed({"ceiling": lambda: a @ b}, 20)["ceiling"]
    record("dense bf16 product 8192^3 (ceiling)", 2 * 8192**3 / seconds / 1e12, "TFLOP/s")


def smoke(name: str) -> Callable[[Recorder], None]:
    """The self-check of a path, problem by problem, going on after a wrong one and saying how it is wrong."""

    def run(record: Recorder) -> None:
        path = next(path for path in PATHS if path.name == name)
        wrong = 0
        for kind in ("rademacher", "gaussian"):
            for precision in cuda.PRECISIONS if path.suits(0, kind) else ():
                tiles = path.rows(kind, precision)
                for problem in self_check.problems((tiles[0], tiles[-1]), crowd=True):
                    wrong += not solve(path.product(0), kind, precision, problem)
        record(f"smoke {name}: wrong problems", wrong, "")
        sys.exit(wrong > 0)

    return run


def solve(accumulate: Accumulate, kind: str, precision: str, problem: self_check.Problem) -> bool:
    entries, block = Entries(kind, 2**63 + 5, 3), problem.block().cuda()
    out = torch.zeros(problem.rows, problem.count, device="cuda")
    more = {} if problem.workspace is None else {"workspace": problem.workspace}
    accumulate(entries, out, block, problem.start, problem.first_k, precision, **more)
    finish(f"{kind} {precision} {problem}")
    k = problem.first_k + torch.arange(problem.count, device="cuda")
    want = torch.zeros(problem.rows, problem.count, dtype=torch.float64, device="cuda")
    for first in range(0, problem.columns, 8192):
        part = block[:, first : first + 8192].double()
        start = problem.start + first
        want += part @ entries.columns(k, start, start + part.shape[1]).T
    exact = kind == "rademacher" and problem.gradients != "uneven"
    error = float((out - want).norm() / want.norm())
    right = torch.equal(out.double(), want) if exact else error < self_check.TOLERANCE[precision]
    print(f"{'ok   ' if right else 'WRONG'} {kind} {precision} {error:.2e} {problem}", flush=True)
    if not right:
        explain_wrong(out, want, entries, problem)
    return right


def explain_wrong(out: torch.Tensor, want: torch.Tensor, entries: Entries, problem: self_check.Problem) -> None:
    """The first six wrong places, how they lie, and of one-hot rows whose column of P they received."""
    wrong = torch.nonzero((out - want).abs() > 1e-3 * want.abs().mean())
    places = [(i, j, float(out[i, j]), float(want[i, j])) for i, j in wrong[:6].tolist()]
    rows, ks = sorted({i for i, _ in wrong.tolist()}), sorted({j % 64 for _, j in wrong.tolist()})
    print(f"      {len(wrong)} wrong; row, k, got, wanted: {places}; rows {rows[:20]}; k mod 64 {ks}; ratio "
          f"{float((out * want).sum() / (want * want).sum()):.4f}; zeros {int((out == 0).sum())}")  # fmt: skip
    if problem.gradients == "one-hot":
        k = problem.first_k + torch.arange(problem.count, device="cuda")
        columns = entries.columns(k, problem.start, problem.start + problem.columns)
        scores = torch.sign(out.double().nan_to_num()) @ columns / problem.count
        received = [(i, int(scores[i].abs().argmax()), round(float(scores[i].abs().max()), 2)) for i in rows[:20]]
        print(f"      row, parameter whose column it received, agreement: {received}")


def packing_only(block: torch.Tensor) -> Callable[[], None]:
    """The launches of `fast` without their products."""
    device = cuda.device(0, hopper=cuda.is_hopper(0))

    class Packs:
        hopper, pack, lanes, resident = device.hopper, device.pack, device.lanes, device.resident

        def multiply(self, *_: object) -> None:
            pass

    out = torch.zeros(len(block), K, device="cuda")
    return lambda: cuda.accumulate(Packs(), Entries("rademacher", SEED, 0), out, block, 0, 0, "fast")


def race(record: Recorder) -> None:
    """640 rows of a quarter of a ResNet18 by every path and the rival, then other sizes by the fastest path."""
    from slab import SlabProduct

    columns = P // 4 // SLAB * SLAB
    block = random_block(640, columns, torch.bfloat16)
    rival, entries = SlabProduct(cuda.device(0, hopper=False), K, SLAB), Entries("rademacher", SEED, 0)
    out = torch.zeros(640, K, device="cuda")
    rival.generate(entries, 1000)
    k = torch.arange(0, K, 97, device="cuda")
    wanted = entries.columns(k, 128_000, 128_000 + SLAB)
    assert torch.equal(rival.slab[k].double(), wanted), "the rival's P is wrong"
    works = {path.name: product_of(path.name, "rademacher", "fast", block)
             for path in PATHS if path.suits(0, "rademacher") and not path.missing(0)}  # fmt: skip
    works |= {
        "slab of P, then cuBLAS": lambda: rival.accumulate(entries, out, block),
        "packing alone": packing_only(block),
        "the rival's generator alone": lambda: [
            rival.generate(entries, b) for b in range(0, columns // 128, SLAB // 128)
        ],
        "the rival's product alone": lambda: [
            torch.mm(block[:, :SLAB], rival.slab.T, out_dtype=torch.float32) for _ in range(columns // SLAB)
        ],
    }
    found = timed(works, 5)
    for name, seconds in found.items():
        flops = 2 * 640 * columns * K
        record(name, flops / seconds / 1e12, "TFLOP/s", 640, columns, f"{1e3 * seconds:.2f} ms, bf16 gradients")
    record("fused / rival", found["slab of P, then cuBLAS"] / found[fastest()], "x", 640, columns)
    works.clear()
    for kind, precision, rows, size in (
        ("rademacher", "fast", 640, P),
        ("rademacher", "fast", 160, P),
        ("rademacher", "fast", 32, P),
        ("rademacher", "fast", 640, 65536),
        ("rademacher", "exact", 640, P // 8),
        ("gaussian", "fast", 640, P // 16),
        ("gaussian", "exact", 640, P // 128),
    ):
        other = random_block(rows, size)
        seconds = timed({"it": product_of(fastest(), kind, precision, other)}, 5)["it"]
        speed, note = 2 * rows * size * K / seconds / 1e12, f"{1e3 * seconds:.2f} ms, float32 gradients"
        record(f"{kind} {precision}", speed, "TFLOP/s", rows, size, note)
        del other


def repeat(record: Recorder) -> None:
    """The same bits 50 times, and four products on four streams, which a launch that is not cooperative may not end."""
    path = next(path for path in PATHS if path.name == fastest())
    entries, block = Entries("rademacher", 7, 0), torch.randn(640, 200_000, device="cuda")  # in three launches

    def product() -> torch.Tensor:
        out = torch.zeros(640, K, device="cuda")
        path.product(0)(entries, out, block, 128, 0, "fast")
        return out

    first, same = product(), 0
    for _ in range(50):
        again = product()
        finish("a product that was right before")
        same += torch.equal(first, again)
    record("equal bits, of 50", same, "")
    streams, outs = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(product())
    for stream in streams:
        with torch.cuda.stream(stream):
            finish("four products on four streams", 20)
    equal = sum(torch.equal(out, first) for out in outs)
    record("equal bits on four streams, of 40", equal, "")
    sys.exit((same, equal) != (50, 40))


def memory(record: Recorder) -> None:
    """What a product of a whole ResNet18 takes beside gradients and features."""
    for name in ("wgmma", "mma", "triton"):
        block = random_block(640, P // 4)
        work = product_of(name, "rademacher", "fast", block)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        finish(name)
        record(f"memory of {name}", (torch.cuda.max_memory_allocated() - before) / 1e6, "MB", 640, P // 4)
        del block, work


STAGES: dict[str, Callable[[Recorder], None]] = {
    "facts": facts,
    **{f"smoke-{name}": smoke(name) for name in ("wgmma", "mma", "triton")},
    "race": race,
    "repeat": repeat,
    "tests": tests,
    "ends": ends,
    "profile": profile,
    "pieces": pieces,
    "sjlt": sjlt,
    "memory": memory,
    "sanitizer": sanitizer,
}

if __name__ == "__main__":
    STAGES[sys.argv[1]](Recorder(Path(sys.argv[2]) / "cuda.csv"))
