"""Pieces for `bench_cuda.py` that could be had otherwise: outer products by layouts, norms, the sparse projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cuda_timing import SEED, K, P, Recorder, fastest, finish, product_of, random_block, timed

from gradstore.projection import cuda, self_check
from gradstore.projection.cuda.sparse_product import SumsTarget
from gradstore.projection.entries import Entries


def pieces(record: Recorder) -> None:
    """Outer products of a ResNet18's layers, by layouts of what is multiplied, and squared norms of what comes out."""
    for shape in ((64, 280, 4608, 16), (64, 280, 2304, 64), (64, 250, 576, 256), (64, 170, 3072, 128)):
        piece(record, *shape)


def piece(record: Recorder, rows: int, outputs: int, width: int, positions: int) -> None:
    """See `pieces`."""
    deltas = torch.randn(rows, outputs, positions, device="cuda")
    turned = torch.randn(rows, width, positions, device="cuda").transpose(1, 2)
    straight, out = turned.contiguous(), torch.empty(rows, outputs, width, device="cuda")
    wide = out.flatten(0, 1)
    found = timed(
        {
            "as it is": lambda: torch.bmm(deltas, turned, out=out),
            "activations in a row": lambda: torch.bmm(deltas, straight, out=out),
            "both turned": lambda: torch.bmm(deltas.mT.contiguous().mT, straight, out=out),
            "norm in float64": lambda: torch.linalg.vector_norm(wide, dim=-1, dtype=torch.float64),
            "norm in float32": lambda: torch.linalg.vector_norm(wide, dim=-1),
        },
        5,
    )
    for name, seconds in found.items():
        note = f"{out.nbytes / seconds / 1e12:.2f} TB/s, {2 * out.numel() * positions / seconds / 1e12:.1f} TFLOP/s"
        record(f"T {positions}, {outputs} x {width}: {name}", 1e3 * seconds, "ms", rows, note=note)


def sjlt(record: Recorder) -> None:
    """The sparse projection: right or not, and how fast beside the dense product."""
    wrong = 0
    for precision in cuda.PRECISIONS:
        for problem in self_check.problems(cuda.SUMS_ROW_TILES, crowd=True, sparse=True):
            wrong += not right(precision, problem)
    record("sparse: wrong products", wrong, "")
    for rows in (640, 160, 32):
        against_dense(record, rows, P // 4)


def right(precision: str, problem: self_check.Problem) -> bool:
    """Whether a product is that of the definition, and has the same bits in other launches."""
    entries, block = Entries("sjlt", 2**63 + 5, 3), problem.block().cuda()

    def product(workspace: int) -> torch.Tensor:
        out = torch.full((problem.rows, problem.count), 2.0, device="cuda")
        device = cuda.sums_device(0)
        cuda.accumulate_sums(
            device, entries, out, block, problem.start, problem.first_k, precision, workspace=workspace
        )
        finish(f"{precision} {problem}")
        return out

    k = problem.first_k + torch.arange(problem.count, device="cuda")
    want, got = 2 + self_check.expected(entries, block, problem.start, k), product(160 << 20)
    error = float((got - want).norm() / want.norm())
    exact = problem.gradients != "uneven"
    fine = torch.equal(got.double(), want) if exact else error < self_check.TOLERANCE[precision]
    fine = fine and torch.equal(product(1 << 20), got)
    print(f"{'ok   ' if fine else 'WRONG'} {precision} {error:.2e} {problem}", flush=True)
    return fine


def against_dense(record: Recorder, rows: int, columns: int) -> None:
    """Times of the sparse product beside the dense one."""
    block, out, device = random_block(rows, columns), torch.zeros(rows, K, device="cuda"), cuda.sums_device(0)

    def sparse(precision: str, target: SumsTarget = device, **more: int) -> Callable[[], None]:
        entries = Entries("sjlt", SEED, 0)
        return lambda: cuda.accumulate_sums(target, entries, out, block, 0, 0, precision, **more)

    found = timed(
        {
            "dense": product_of(fastest(), "rademacher", "fast", block),
            "sparse": sparse("fast"),
            "sparse exact": sparse("exact"),
            "sparse without packing": sparse("fast", Unpacked(device)),
            **{f"sparse, {size} MB": sparse("fast", workspace=size << 20) for size in (80, 320)},
        },
        5,
    )
    for name, seconds in found.items():
        record(f"{name} product", 1e3 * seconds, "ms", rows, columns, f"{found['dense'] / seconds:.2f} x dense")


class Unpacked:
    """Multiplies what lies in the workspace, for timing."""

    def __init__(self, device: SumsTarget) -> None:
        self.tile_rows, self.multiply = device.tile_rows, device.multiply

    def pack(self, *_: object) -> None:
        """Nothing."""
