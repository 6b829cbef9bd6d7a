"""The stages of `bench_cuda.py`, each run as ``python cuda_stages.py STAGE FOLDER``."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from setting import setting
from sjlt import SjltProduct, by_definition

import gradstore as gs
from gradstore.projection import cuda, self_check, trust
from gradstore.projection.cuda import cuda_source
from gradstore.projection.cuda.geometry import variant_for
from gradstore.projection.device_paths import PATHS, Accumulate
from gradstore.projection.entries import Entries
from gradstore.projection.projection_audit import AuditSchedule

ROOT = Path(__file__).parent.parent
K, P = 10240, 11_173_962  # of a ResNet18
SEED = 0
SLAB = 32768
HANGS_AFTER = 6.0
PACKAGES = ("torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "numpy", "h5py", "pytest")


class Recorder:
    """Prints a figure and adds it to the CSV file at once, so that a later hang loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, measure: str, value: float, unit: str, rows: int = 0, p: int = 0, note: str = "") -> None:
        row = {"measure": measure, "rows": rows, "p": p, "K": K, "value": f"{value:.4g}", "unit": unit, "note": note}
        full = {**row, **setting(SEED)}
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(full))
            if new:
                writer.writeheader()
            writer.writerow(full)
        print(f"{measure:44} {value:10.4g} {unit:8} {rows or '':>5} x {p or '':<9} {note}", flush=True)


# ---- facts ---------------------------------------------------------------------------------------------------------


def facts(record: Recorder) -> None:
    """Versions, why a path cannot be had, the ceiling."""
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    print(torch.cuda.get_device_properties(0))
    for path in PATHS:
        why = path.missing(0) if path.suits(0, "rademacher") else "not for this device"
        print(f"{path.name}: {why or 'can be had'}")
    carried = set(os.listdir(cuda_source.cache_folder())) if cuda_source.cache_folder().exists() else set()
    began = time.perf_counter()
    cuda_source.cubin(variant_for("rademacher", "fast", 640, True), "sm_90a")
    new = set(os.listdir(cuda_source.cache_folder())) - carried
    record("first variant's code", time.perf_counter() - began, "s", note="compiled" if new else "from the cache")
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = timed({"ceiling": lambda: a @ b}, 20)["ceiling"]
    record("dense bf16 product 8192^3 (ceiling)", 2 * 8192**3 / seconds / 1e12, "TFLOP/s")


# ---- smoke ---------------------------------------------------------------------------------------------------------


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


def finish(what: str, seconds: float = HANGS_AFTER) -> None:
    """Poll the device; a hang is said and ends the stage, since nothing later in this process could run."""
    event, end = torch.cuda.current_stream().record_event(), time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > end:
            print(f"HANGS: {what}", flush=True)
            os._exit(7)
        time.sleep(0.0005)


# ---- race ----------------------------------------------------------------------------------------------------------


def timed(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each rival; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for name, work in works.items():
        work()
        finish(name, 30)
    for _ in range(repeats):
        for name, work in works.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def random_block(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows begin at multiples of 128 bytes, as cuBLAS likes them."""
    block = torch.empty(rows, -(-columns // 64) * 64, dtype=dtype, device="cuda")
    for row in block:
        row.normal_()
    return block[:, :columns]


def product_of(name: str, kind: str, precision: str, block: torch.Tensor) -> Callable[[], None]:
    path = next(path for path in PATHS if path.name == name)
    entries, out = Entries(kind, SEED, 0), torch.zeros(len(block), K, device="cuda")
    product = path.product(0)
    return lambda: product(entries, out, block, 0, 0, precision)


def fastest() -> str:
    return next(path.name for path in PATHS if path.suits(0, "rademacher") and not path.missing(0))


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


# ---- repeat --------------------------------------------------------------------------------------------------------


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


# ---- after the first run is mended ---------------------------------------------------------------------------------


def tests(record: Recorder) -> None:
    """The GPU tests, path by path, a minute a test, after the checks that the first of each kind would wait for."""
    for path in PATHS:
        for kind in ("rademacher", "gaussian"):
            if path.suits(0, kind) and not path.missing(0):
                for precision in cuda.PRECISIONS:
                    found = trust.verdict(path, 0, kind, precision)
                    print(f"{path.name} {kind} {precision}: {found.fault or 'right'}, {found.seconds} s", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "--timeout", "60", "--tb=short"]
    files = [
        "tests/projection/test_cuda_gpu.py",
        "tests/machine/test_streams.py",
        "tests/demo/test_demo.py",
        "-p",
        "no:cacheprovider",
        "-p",
        "failures_at_once",
        "--durations=12",
        *shlex.split(os.environ.get("GPU_TESTS", "")),
    ]
    with_several = ["-n", "4"] if shutil.which("nvidia-smi") else []
    began = time.perf_counter()
    here = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": here}
    code = subprocess.run([*command, *files, *with_several], cwd=ROOT, env=environment).returncode
    record("GPU tests", code, "exit", note=f"{time.perf_counter() - began:.0f} s")
    sys.exit(code)


def featurized(model: torch.nn.Module, inputs: torch.Tensor, classes: int) -> dict[str, float]:
    """Seconds that featurize spends on its rows, and where."""
    data = torch.utils.data.TensorDataset(inputs, torch.randint(0, classes, (len(inputs),)))
    last: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        gs.featurize(
            gs.Project(model=model, splits={"train": data}),
            split="train",
            out=Path(folder) / "store",
            proj_dim=K,
            device="cuda",
            progress=lambda state: last.update(seconds=state.seconds, **state.busy),
        )
    return last


def not_audited(model: torch.nn.Module, inputs: torch.Tensor, classes: int) -> float:
    """Seconds of a run in which no batch is audited."""
    before, AuditSchedule.due = AuditSchedule.due, property(lambda self: False)  # type: ignore[assignment]
    try:
        return featurized(model, inputs, classes)["seconds"]
    finally:
        AuditSchedule.due = before  # type: ignore[method-assign]


def large_models() -> tuple:
    """Name, model, inputs by their number, classes, examples of the whole data set and of a measurement."""
    from bench_jacobians import resnet18
    from bert import LENGTH, VOCABULARY, Bert

    torch.manual_seed(SEED)
    return (
        ("ResNet18, 10 classes", resnet18(), lambda n: torch.randn(n, 3, 32, 32), 10, 60000, 512),
        ("BERT-base, 2 classes", Bert(), lambda n: torch.randint(0, VOCABULARY, (n, LENGTH)), 2, 8192, 320),
    )


def ends(record: Recorder) -> None:
    """Featurize a ResNet18 on CIFAR-shaped data and a BERT-base on tokens, and what the whole would take.

    The first batch of a run is audited whatever it costs, later ones for 0.5 % of the projection's time.
    """
    for name, model, make, classes, whole, n in large_models():
        p = sum(parameter.numel() for parameter in model.parameters())
        featurized(model, make(n // 8), classes)  # compiles, warms up
        torch.cuda.reset_peak_memory_stats()
        found = featurized(model, make(n), classes)
        memory = torch.cuda.max_memory_allocated() / 1e9
        note = ", ".join(f"{key} {value:.1f}" for key, value in found.items())
        record(f"featurize {name}, its first audit included", n / found["seconds"], "rows/s", n, p, note)
        seconds = not_audited(model, make(n), classes)
        record("without audits", n / seconds, "rows/s", n, p, f"{seconds:.2f} s")
        first = max(0.0, found["seconds"] - seconds)
        record(f"extrapolated to {whole} rows", (first + 1.005 * whole * seconds / n) / 60, "min", whole, p)
        record("GPU memory", memory, "GB", n, p)


def profile(record: Recorder) -> None:
    """Which kernels whole runs spend their time in, how long the card has none to run, and where the host is."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    for name, model, make, classes, _, n in large_models():
        not_audited(model, make(n // 8), classes)
        with sampled() as places, profiled(activities=[ProfilerActivity.CUDA]) as found:
            seconds = not_audited(model, make(n // 2), classes)
        kernels = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in found.events()
            if str(event.device_type).endswith("CUDA") and not event.is_user_annotation
        )
        busy, covered = 0.0, float("-inf")
        for begin, end, _ in kernels:
            busy, covered = busy + max(0.0, end - max(begin, covered)), max(covered, end)
        record(f"kernels of {name}, and its plan", len(kernels), "", n // 2)
        record("the card is busy", busy / 1e6, "s", n // 2, note=f"run {seconds:.2f} s")
        times: dict[str, list[float]] = {}
        for begin, end, kernel in kernels:
            times.setdefault(kernel[:90], []).append((end - begin) / 1e3)
        for kernel, spent in sorted(times.items(), key=lambda item: -sum(item[1]))[:18]:
            print(f"{sum(spent):9.1f} ms {len(spent):6} x {kernel}")
        for place, count in places.most_common(14):
            print(f"{count / places.total():6.1%} of the host's time at {place}")


@contextmanager
def sampled() -> Iterator[Counter[str]]:
    """Where this thread is, looked at every few milliseconds: gradstore's own innermost line."""
    places: Counter[str] = Counter()
    ended, thread = threading.Event(), threading.get_ident()

    def look() -> None:
        while not ended.wait(0.003):
            frame = sys._current_frames().get(thread)
            while frame is not None and "/gradstore/" not in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is not None:
                places[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"] += 1

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    try:
        yield places
    finally:
        ended.set()
        looker.join()


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


def sanitizer(record: Recorder) -> None:
    """A small product of each variant under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    code = (
        "import sys, time, torch\n"
        "from gradstore.projection import cuda\n"
        "from gradstore.projection.entries import Entries\n"
        "for hopper in {False, cuda.is_hopper(0)}:\n"
        "    for kind in ('rademacher', 'gaussian'):\n"
        "        for precision in ('fast', 'exact'):\n"
        "            began = time.time()\n"
        "            out, block = torch.zeros(33, 300, device='cuda'), torch.ones(33, COLUMNS, device='cuda')\n"
        "            device = cuda.device(0, hopper=hopper)\n"
        "            cuda.accumulate(device, Entries(kind, 1, 0), out, block, 128, 0, precision)\n"
        "            torch.cuda.synchronize()\n"
        "            print('done', hopper, kind, precision, round(time.time() - began, 1), 's', flush=True)\n"
    )
    failed = 0
    for check, columns in (("memcheck", 20000), ("racecheck", 8192 + 256), ("synccheck", 20000)):
        # Not the driver functions that bindings look up and an older driver lacks: those are reported as errors, too.
        more = ["--report-api-errors", "no"] if check == "memcheck" else []
        program = code.replace("COLUMNS", str(columns))
        command = [tool, "--tool", check, *more, "--error-exitcode", "9", sys.executable, "-c", program]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        timer = threading.Timer(75, os.killpg, (process.pid, signal.SIGKILL))  # with the program that it watches
        timer.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if len(lines) <= 60:
                print(lines[-1], flush=True)
        status = process.wait()
        timer.cancel()
        summary = [line for line in lines if "SUMMARY" in line] or [f"none, {len(lines)} lines"]
        record(check, status, "exit", note="; ".join(summary)[:150])
        failed += status != 0
    sys.exit(failed)


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
