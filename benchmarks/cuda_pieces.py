"""Pieces for `bench_cuda.py` that could be had otherwise: outer products by layouts, norms, the sparse projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cuda_timing import SEED, K, P, Recorder, fastest, finish, product_of, random_block, timed
from sjlt import SjltProduct, by_definition

from gradstore.projection import cuda, self_check


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
    product, wrong = SjltProduct(cuda.device(0, hopper=cuda.is_hopper(0)).architecture), 0
    for rows, columns, count, start, whole in (
        (31, 5000, 3072, 2**40 + 100, True), (1, 1, 1024, 0, True), (33, 20000, 10240, 4095, True),
        (70, 9001, 5120, (2**32 - 7) * 128, True), (640, 100_000, 10240, 128, False), (5, 50_000, 1024, 77, False),
    ):  # fmt: skip
        block = torch.randint(-8, 9, (rows, columns), device="cuda").float()
        if not whole:
            block = torch.randn(rows, columns, device="cuda") * torch.randn(rows, columns, device="cuda").mul(2).exp()
        out = torch.full((rows, count), 2.0, device="cuda")
        product.accumulate(2**63 + 5, 3, out, block, start, workspace=8 << 20 if rows == 70 else 80 << 20)
        finish("a sparse product")
        want = 2 + by_definition(2**63 + 5, 3, block, start, count)
        error = float((out - want).norm() / want.norm())
        right = torch.equal(out.double(), want) if whole else error < self_check.TOLERANCE["exact"]
        again = torch.full((rows, count), 2.0, device="cuda")
        product.accumulate(2**63 + 5, 3, again, block, start, workspace=1 << 20)
        right = right and torch.equal(again, out)
        print(f"{'ok   ' if right else 'WRONG'} {rows} x {columns} to {count} from {start}: {error:.2e}", flush=True)
        wrong += not right
    record("sparse: wrong products", wrong, "")
    for rows in (640, 160, 32):
        against_dense(record, product, rows, P // 4)


def against_dense(record: Recorder, product: SjltProduct, rows: int, columns: int) -> None:
    """Times of the sparse product beside the dense one."""
    block, out = random_block(rows, columns), torch.zeros(rows, K, device="cuda")

    def sparse(**more: object) -> Callable[[], None]:
        return lambda: product.accumulate(SEED, 0, out, block, 0, **more)

    found = timed(
        {
            "dense": product_of(fastest(), "rademacher", "fast", block),
            "sparse": sparse(),
            "sparse without packing": sparse(packs=False),
            **{f"sparse, {size} MB": sparse(workspace=size << 20) for size in (20, 40, 320)},
        },
        5,
    )
    for name, seconds in found.items():
        record(f"{name} product", 1e3 * seconds, "ms", rows, columns, f"{found['dense'] / seconds:.2f} x dense")
