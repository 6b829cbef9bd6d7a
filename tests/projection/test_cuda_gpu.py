"""The fused CUDA projection on a CUDA device, against dense float64 products; skipped where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_paths import spoiled_source
from synthetic import clustered, dense_similarity, write_store

import gradstore as gs
from gradstore.errors import NonFiniteError, ProjectError
from gradstore.jacobians import DenseBlock, EmbeddingBlock, LinearBlock
from gradstore.projection import Projection, cuda, self_check, trust
from gradstore.projection.cuda import cuda_source
from gradstore.projection.device_paths import PATHS
from gradstore.projection.entries import Entries
from gradstore.projection.projection_audit import AuditSchedule, Comparison, ProjectionAudit

WHY_NOT = "" if torch.cuda.is_available() else "no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "projection.json").read_text())
FIRST = next((path.name for path in PATHS if not WHY_NOT and path.suits(0, "gaussian")), "")
VARIANTS = [(kind, precision) for kind in ("rademacher", "gaussian", "sjlt") for precision in ("fast", "exact")]
BOUND = {"fast": 4e-4, "exact": 3e-6}  # relative error of a feature vector
SHAPES = [  # rows, p, K, start, first_k
    (1, 1, 1, 0, 0),
    (3, 129, 17, 127, 3),
    (32, 777, 300, 100, 9),
    (31, 20000, 257, 2**31 - 300, 0),
    (640, 3000, 513, 2**40 + 7, 2**20),
    (650, 9001, 129, 8192 * 3 - 129, 1),
    (640, 200_000, 513, 128, 0),  # launches whose memory is used again
]


def own_kind(path):
    """The kind that a path is tried with where one is enough."""
    return "sjlt" if path.name == "sums" else "rademacher"


@pytest.fixture(params=PATHS, ids=lambda path: path.name)
def path(request):
    """Every way to multiply by P that this device has."""
    if not request.param.suits(0, own_kind(request.param)):
        pytest.skip("not for this device")
    if request.param.missing(0):
        pytest.skip(request.param.missing(0))
    return request.param


def accumulate(entries, out, block, start=0, first_k=0, precision="exact", path=None):
    path = path or trust.chosen(0, entries.kind, precision).path
    if not path.suits(0, entries.kind):
        pytest.skip(f"{path.name} has no {entries.kind}")
    path.product(block.device.index)(entries, out, block, start, first_k, precision)
    return out


def dense(entries, block, start, count, first_k):
    """By the definition, in float64 on the device; some columns at a time."""
    k, total = first_k + torch.arange(count, device="cuda"), 0.0
    for part in block.cuda().double().split(8192, dim=1):
        total = total + self_check.expected(entries, part, start, k)
        start += part.shape[1]
    return total.cpu()


def relative_error(got, want):
    """Zero where both are, as few values of a sparse product may be."""
    return float((got.cpu().double() - want).norm() / want.norm().clamp(min=1e-300))


def gradients(rows, columns, seed=0, spread=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return (normal * torch.exp(spread * torch.randn(rows, columns, generator=generator))).to("cuda", dtype)


@pytest.mark.parametrize("rows", [7, 640])
def test_integers_come_out_exactly(path, rows):
    """In one limb small integers are exact, and so are their sums: any misplaced sign or gradient shows."""
    generator = torch.Generator().manual_seed(1)
    block = torch.randint(-8, 9, (rows, 20000), generator=generator).float().cuda()
    entries = Entries(own_kind(path), 2**63 + 5, 3)
    got = accumulate(entries, torch.full((rows, 600), 2.0, device="cuda"), block, 384, 9, "fast", path)
    assert torch.equal(got.cpu().double(), 2 + dense(entries, block, 384, 600, 9))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "precision"), VARIANTS)
def test_the_product_equals_the_dense_one(path, kind, precision, shape):
    rows, columns, count, start, first_k = shape
    entries, block = Entries(kind, 7, 0), gradients(rows, columns, seed=rows)
    got = accumulate(entries, torch.zeros(rows, count, device="cuda"), block, start, first_k, precision, path)
    assert relative_error(got, dense(entries, block, start, count, first_k)) < BOUND[precision]


@pytest.mark.parametrize(("kind", "precision"), [variant for variant in VARIANTS if variant[0] != "sjlt"])
def test_the_projected_vector_matches_the_vectors(kind, precision):
    case = VECTORS["projected"]
    i = torch.arange(1, case["P"] + 1, dtype=torch.float64)
    gradient = (torch.sin(0.37 * i) * 10.0 ** (-(i % 5)))[None].float().cuda()
    projection = Projection(kind, dim=case["K"], seed=case["seed"], precision=precision)
    want = torch.tensor(case[f"{kind}_over_sqrt_K"], dtype=torch.float64)
    assert projection.path(gradient.device) == f"{FIRST} {precision}"
    assert relative_error(projection.project(gradient)[0], want) < BOUND[precision]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_read_as_it_is(dtype, path):
    entries, block = Entries(own_kind(path), 7, 0), gradients(5, 3000, spread=0.5, dtype=dtype)
    got = accumulate(entries, torch.zeros(5, 100, device="cuda"), block, path=path)
    assert relative_error(got, dense(entries, block, 0, 100, 0)) < BOUND["exact"]


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_tiny_and_huge_gradients_keep_their_precision(scale, precision, path):
    entries, block = Entries(own_kind(path), 7, 0), gradients(2, 300, spread=0.0) * scale
    got, want = (
        accumulate(entries, torch.zeros(2, 70, device="cuda"), block, precision=precision, path=path),
        dense(entries, block, 0, 70, 0),
    )
    assert (got.cpu().double() - want).abs().max() <= 4e-4 * want.abs().max() + 2**-149


def test_what_is_not_finite_stays_in_its_row(path):
    block = torch.ones(3, 200, device="cuda")
    block[0, 5], block[1, 7] = torch.nan, torch.inf
    entries = Entries(own_kind(path), 7, 0)
    got = accumulate(entries, torch.zeros(3, 70, device="cuda"), block, path=path)
    assert not torch.isfinite(got[:2]).any()
    assert torch.equal(got[2:].cpu().double(), dense(entries, block[2:], 0, 70, 0))


@pytest.mark.parametrize(("kind", "precision"), VARIANTS)
def test_fifty_runs_give_the_same_bits(path, kind, precision):
    entries, block = Entries(kind, 7, 0), gradients(640, 30000)
    first = accumulate(entries, torch.zeros(640, 1000, device="cuda"), block, 128, 0, precision, path)
    for _ in range(49):
        again = accumulate(entries, torch.zeros(640, 1000, device="cuda"), block, 128, 0, precision, path)
        assert torch.equal(again, first)


@pytest.mark.parametrize(("kind", "precision"), VARIANTS)
def test_bits_do_not_depend_on_the_rows_beside_them(path, kind, precision):
    entries, block = Entries(kind, 7, 0), gradients(640, 30000)
    whole = accumulate(entries, torch.zeros(640, 600, device="cuda"), block, 128, 0, precision, path)
    for rows in (slice(0, 1), slice(5, 37), slice(600, 640)):
        part = block[rows]
        alone = accumulate(entries, torch.zeros(len(part), 600, device="cuda"), part, 128, 0, precision, path)
        assert torch.equal(alone, whole[rows])
    some = accumulate(entries, torch.zeros(640, 100, device="cuda"), block, 128, 77, precision, path)
    assert torch.equal(some, whole[:, 77:177])


def test_more_than_2_31_columns(path):
    columns = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * columns:
        pytest.skip("needs 13 GB of free GPU memory")
    generator = torch.Generator().manual_seed(2)
    places = torch.cat(
        (torch.randint(0, columns, (2000,), generator=generator), torch.tensor([0, 2**31, columns - 1]))
    ).unique()
    block = torch.zeros(2, columns, dtype=torch.bfloat16, device="cuda")
    values = torch.randint(1, 9, (2, len(places)), generator=generator).bfloat16()
    block[:, places.cuda()] = values.cuda()
    entries = Entries(own_kind(path), 7, 0)
    got = accumulate(entries, torch.zeros(2, 64, device="cuda"), block, 2**31 - 128, 0, "fast", path)
    want = values.double() @ entries.at(torch.arange(64)[:, None], 2**31 - 128 + places).T
    assert torch.equal(got.cpu().double(), want)


def test_it_runs_on_the_current_stream(path):
    entries, stream = Entries(own_kind(path), 7, 0), torch.cuda.Stream()
    source = gradients(16, 4000)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the product must wait for what is queued before it
        block = source * 2
        got = accumulate(entries, torch.zeros(16, 100, device="cuda"), block, path=path)
    stream.synchronize()
    assert relative_error(got, dense(entries, source, 0, 100, 0) * 2) < BOUND["exact"]


def test_a_thread_that_has_not_used_the_device_yet_may_call_it(path):
    entries, block = Entries(own_kind(path), 7, 0), gradients(4, 500)
    out = torch.zeros(4, 90, device="cuda")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(accumulate, entries, out, block, path=path).result()
    torch.cuda.synchronize()
    assert relative_error(out, dense(entries, block, 0, 90, 0)) < BOUND["exact"]


def test_memory_beside_gradients_and_features_is_small(path):
    entries, block = Entries(own_kind(path), 7, 0), torch.randn(640, 200_000, device="cuda")
    out = torch.zeros(640, 10240, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    accumulate(entries, out, block, precision="fast", path=path)
    assert torch.cuda.max_memory_allocated() - before <= 256e6


def test_outputs_and_blocks_of_any_layout(path):
    entries = Entries(own_kind(path), 7, 0)
    block = gradients(600, 9).T[::2, 100:]
    out = torch.ones(80, 5, device="cuda").T
    accumulate(entries, out, block, path=path)
    assert relative_error(out, 1 + dense(entries, block, 0, 80, 0)) < BOUND["exact"]


def small_project():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.GELU(), torch.nn.Flatten())
        model = conv.append(torch.nn.Linear(8 * 64, 5))
    x, y = torch.randn(70, 1, 8, 8, generator=generator), torch.arange(70) % 5
    return gs.Project(model=model, splits={"train": torch.utils.data.TensorDataset(x, y)})


@pytest.mark.parametrize("layout", ["per-class", "sum", "mixed"])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_stores_hold_what_the_cpu_computes(precision, layout, tmp_path):
    settings = {"split": "train", "proj_dim": 1000, "dtype": "float32", "layout": layout, "precision": precision}
    card = gs.featurize(small_project(), out=tmp_path / "card", device="cuda", **settings)
    host = gs.featurize(small_project(), out=tmp_path / "host", device="cpu", **settings)
    got, want = torch.from_numpy(card.features[:]), torch.from_numpy(host.features[:]).double()
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() < BOUND[precision] + 1e-5
    assert card.fingerprint == host.fingerprint


@pytest.mark.parametrize("layout", ["per-class", "sum", "mixed"])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_stores_of_a_sparse_projection_hold_what_the_cpu_computes(precision, layout, tmp_path):
    settings = {"split": "train", "projection": "sjlt", "proj_dim": 4096, "dtype": "float32", "layout": layout}
    card = gs.featurize(small_project(), out=tmp_path / "card", device="cuda", precision=precision, **settings)
    host = gs.featurize(small_project(), out=tmp_path / "host", device="cpu", precision=precision, **settings)
    got, want = torch.from_numpy(card.features[:]), torch.from_numpy(host.features[:]).double()
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() < 2e-5
    assert card.fingerprint == host.fingerprint


def test_a_sparse_projection_grows_by_whole_blocks_and_bits_stay(path):
    if path.name != "sums":
        pytest.skip(f"{path.name} has no sjlt")
    entries, block = Entries("sjlt", 7, 0), gradients(33, 40_000)
    whole = accumulate(entries, torch.zeros(33, 5120, device="cuda"), block, 77, 0, "fast", path)
    grown = accumulate(entries, torch.zeros(33, 2048, device="cuda"), block, 77, 3072, "fast", path)
    assert torch.equal(grown, whole[:, 3072:])
    small = partial(path.product(0), workspace=1 << 20)
    again = torch.zeros(33, 5120, device="cuda")
    small(entries, again, block, 77, 0, "fast")
    assert torch.equal(again, whole)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("fault", ["another-block", "unsynchronised", "rows-of-another-scale"])
def test_a_fault_in_the_sums_on_the_card_is_found(fault, tmp_path, monkeypatch):
    folder = spoiled_source(tmp_path / "src", fault)
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    program = ("-c", CHECK_OTHER_SOURCE, str(folder))
    monkeypatch.setattr(trust, "check_apart", partial(trust.check_apart, program=program))
    found = trust.choose(PATHS, 0, "sjlt", "fast", trust.verdict)
    assert found.path is None
    assert [line.split(":")[0] for line in found.passed_over] == ["sums"]


def test_stores_have_the_same_bits_for_every_batch_size(tmp_path):
    found = []
    for batch_size in (16, 32, 70):
        out = tmp_path / str(batch_size)
        settings = {"proj_dim": 1000, "device": "cuda", "batch_size": batch_size, "memory": "4GB"}
        gs.featurize(small_project(), split="train", out=out, **settings)
        found.append({path.name: path.read_bytes() for path in (*out.glob("*.h5"), out / "store.json")})
    assert found[0] == found[1] == found[2]


def test_bad_rows_are_left_out_as_on_a_cpu(tmp_path):
    found = []
    for device in ("cuda", "cpu"):
        project = small_project()
        inputs = project.splits["train"].tensors[0]
        inputs[[3, 40]] = torch.nan
        inputs[69] = torch.inf
        store = gs.featurize(
            project, split="train", out=tmp_path / device, proj_dim=1000, device=device, on_bad_row="skip"
        )
        found.append(store)
    there, here = found
    assert np.flatnonzero(there.absent).tolist() == [3, 40, 69]
    assert (there.absent == here.absent).all()
    assert np.isnan(there.sq_norms[[3, 40, 69]]).all()
    assert abs(there.sq_norms - here.sq_norms)[there.absent == 0].max() < 1e-4 * np.nanmax(here.sq_norms)


class CentredByItsBatch(torch.nn.Linear):
    def forward(self, x):
        logits = super().forward(x.flatten(1))
        return logits - logits.mean(0)


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_model_that_looks_at_its_batch_is_refused_on_a_card(on_bad_row, tmp_path):
    project = replace(small_project(), model=CentredByItsBatch(64, 5))
    with pytest.raises(ProjectError, match=r"beside other rows|on the other examples"):
        gs.featurize(project, split="train", out=tmp_path / "s", proj_dim=100, device="cuda", on_bad_row=on_bad_row)
    assert not list((tmp_path / "s").glob("shard*"))


@pytest.mark.parametrize("allowed", ["by the older name", "by the newer name"])
def test_tf32_that_the_user_allows_changes_no_bit(allowed, tmp_path):
    settings = {"proj_dim": 1000, "device": "cuda", "precision": "exact", "dtype": "float32"}
    usual = gs.featurize(small_project(), split="train", out=tmp_path / "usual", **settings)
    products, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        if allowed == "by the older name":
            torch.set_float32_matmul_precision("high")
        elif hasattr(products, "fp32_precision"):
            products.fp32_precision = "tf32"
        else:
            pytest.skip("this torch has no newer name")
        so = gs.featurize(small_project(), split="train", out=tmp_path / "so", **settings)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (so.features[:] == usual.features[:]).all()
    assert (so.sq_norms == usual.sq_norms).all()


@pytest.mark.parametrize("layout", ["per-class", "sum", "mixed"])
@pytest.mark.parametrize(("kind", "precision"), [variant for variant in VARIANTS if variant[0] != "sjlt"])
def test_right_stores_pass_the_audit_with_room_to_spare(kind, precision, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(AuditSchedule, "due", True)
    require, margins = Comparison.require, []

    def measured(self, sq_norm, split):
        assert self.path == f"{FIRST} {precision}"
        margins.append(float((self.want - self.got).abs().max()) / self.tolerance(sq_norm))
        require(self, sq_norm, split)

    monkeypatch.setattr(Comparison, "require", measured)
    settings = {"projection": kind, "layout": layout, "precision": precision, "proj_dim": 1000, "device": "cuda"}
    gs.featurize(small_project(), split="train", out=tmp_path / "s", batch_size=16, **settings)
    assert len(margins) == 2  # groups of 64 rows
    assert max(margins) < 0.6


def test_signs_that_are_flipped_on_the_card_are_refused(tmp_path, monkeypatch):
    right = cuda.accumulate

    def wrong(device, entries, out, block, start, *rest):
        right(device, entries, out, -block if start else block, start, *rest)  # of all parameters but the first

    monkeypatch.setattr(cuda, "accumulate", wrong)
    with pytest.raises(NonFiniteError, match=rf"{FIRST} fast path: .* run `gradstore doctor"):
        gs.featurize(small_project(), split="train", out=tmp_path / "s", proj_dim=1000, device="cuda")
    assert not list((tmp_path / "s").glob("shard*"))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_an_audit_does_not_wait_for_the_device(kind):
    n, c, device = 5, 3, torch.device("cuda:0")
    indices = torch.randint(0, 9, (n, 7), device=device)
    blocks = [
        DenseBlock("bias", 0, torch.randn(n, c, 500, device=device)),
        LinearBlock("weight", 512, torch.randn(n, 1, 70, device=device), torch.randn(n, c, 1, 30, device=device)),
        EmbeddingBlock("tokens", 4096, indices, torch.randn(n, c, 7, 20, device=device), 1000),
    ]

    def look():
        audit = ProjectionAudit(Projection(kind, 300), [range(n)], c, mixed=False, first_k=0, device=device)
        for block in blocks:
            audit.look(0, block, formed=False)
        return audit.compare(torch.zeros(n, c, 300, device=device))

    look()  # tables are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = look()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = torch.zeros(len(found.k), dtype=torch.float64)
    for block in blocks:
        columns = block.start + torch.arange(block.size)
        entries = Entries(kind, 0, 0).at(torch.from_numpy(found.k)[:, None], columns)
        want += entries @ block.dense()[found.i, found.c].cpu().double()
    assert (found.want.cpu() - want).abs().max() < 1e-4


@pytest.fixture(scope="module")
def feature_stores(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores")
    return write_store(path / "train", clustered(300, 3, 200)), write_store(
        path / "test", clustered(70, 3, 200, seed=1)
    )


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-pntk", "proj-trntk0"])
def test_gram_matrices_equal_the_dense_products(feature_stores, kernel):
    train, test = feature_stores
    for a, b in ((train, None), (test, train)):
        expected = dense_similarity(b or a, a, kernel)
        made = list(gs.gram(a, b, kernel, arithmetic="float32", device="cuda", memory="1MB"))
        assert len(made) > 1
        for tile in made:
            want = expected[tile.start_a : tile.rows.stop, tile.start_b : tile.columns.stop]
            assert abs(tile.values - want).max() < 3e-6 * abs(expected).max()


def test_a_search_has_the_answers_of_the_cpu(feature_stores):
    pytest.importorskip("threadpoolctl")
    train, test = feature_stores
    there, here = (gs.topk(train, test, k=10, engine=engine) for engine in ("cuda", "float32"))
    assert (there.rows == here.rows).all()
    assert (there.similarity == here.similarity).all()


@pytest.mark.parametrize("kernel", ["trntk", "pntk", "ck"])
def test_exact_kernels_equal_those_of_the_cpu(kernel):
    there, here = (gs.exact_gram(small_project(), kernel=kernel, device=device) for device in ("cuda", "cpu"))
    assert abs(there - here).max() < 1e-5 * abs(here).max()


CHECK_OTHER_SOURCE = """
import sys
from pathlib import Path
from gradstore.projection import self_check
from gradstore.projection.cuda import cuda_source
cuda_source.FOLDER = Path(sys.argv[1])
self_check.main(sys.argv[2:])
"""
NOT_PASSED = 'if (leads) asm volatile("st.release', 'if (false) asm volatile("st.release'
FAULTS = {
    "a permuted column": ("entries.cuh", "16 * element + chunk;", "16 * element + (chunk ^ (chunk == 5));"),
    "a wrong word": ("entries.cuh", "(u32)(b >> 32), k,", "(u32)(b >> 32), k + (b == 1),"),
    "a turn that is not passed": ("fold.cuh", *NOT_PASSED),
    "an address out of bounds": ("pack.cuh", "row / job.tile_rows;", "row / job.tile_rows + (1LL << 40);"),
}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_card_is_found_and_the_next_path_is_taken(fault, tmp_path, monkeypatch):
    """In the CUDA source, so that both of its forms fail; Triton knows nothing of it."""
    folder, (file, right, wrong) = tmp_path / "src", FAULTS[fault]
    shutil.copytree(cuda_source.FOLDER, folder)
    text = (folder / file).read_text()
    assert right in text
    (folder / file).write_text(text.replace(right, wrong))
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    program = ("-c", CHECK_OTHER_SOURCE, str(folder))
    monkeypatch.setattr(trust, "check_apart", partial(trust.check_apart, program=program))
    found = trust.choose(PATHS, 0, "rademacher", "fast", trust.verdict)
    assert found.path.name == "triton"
    assert [line.split(":")[0] for line in found.passed_over] == [p.name for p in PATHS if p.suits(0, "gaussian")]
    print(fault, found.passed_over)


@pytest.mark.timeout(90)
def test_a_product_that_gives_up_says_what_it_waited_for(tmp_path):
    """In a process of its own, since nothing else can be done on a device whose kernel has trapped."""
    code = GIVES_UP.replace("SOURCES", repr(str(tmp_path / "src")))
    shutil.copytree(cuda_source.FOLDER, tmp_path / "src")
    file = tmp_path / "src" / "fold.cuh"
    file.write_text(file.read_text().replace(*NOT_PASSED))
    waiting = tmp_path / "src" / "waiting.cuh"
    waiting.write_text(waiting.read_text().replace("10'000'000'000", "1'000'000'000"))
    environment = {**os.environ, "GRADSTORE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert "gave up waiting for its turn to add to the output" in done.stdout, done.stderr


GIVES_UP = """
from pathlib import Path
import torch
from gradstore.projection import Projection, trust
from gradstore.projection.cuda import cuda_source
cuda_source.FOLDER = Path(SOURCES)
from gradstore.projection.device_paths import PATHS
path = next(path for path in PATHS if path.suits(0, "rademacher"))
trust.chosen = lambda *_: trust.Choice(path, ())
try:
    with trust.explained(0, "rademacher", "fast"):
        Projection(dim=3000).project(torch.ones(640, 60000, device="cuda")).cpu()
except Exception as error:
    print(error, flush=True)
"""
