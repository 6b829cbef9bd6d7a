"""Launch geometry of the fused CUDA projection: every parameter once, at fixed cuts, within the memory asked for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.projection.cuda.fused_product import WORKSPACE_BYTES
from gradstore.projection.cuda.geometry import GROUP, PRECISIONS, SPAN, balanced_spans, launches, slabs, variant_for

KINDS = ("rademacher", "gaussian")
SHARED_BYTES = {True: 227 << 10, False: 99 << 10}  # Hopper; the least of the cards since Ampere

variants = st.builds(
    variant_for, st.sampled_from(KINDS), st.sampled_from(PRECISIONS), st.integers(1, 5000), st.booleans()
)


@given(
    kind=st.sampled_from(KINDS), precision=st.sampled_from(PRECISIONS), rows=st.integers(1, 10**6), hopper=st.booleans()
)
def test_a_variant_fits_the_hardware(kind, precision, rows, hopper):
    variant = variant_for(kind, precision, rows, hopper)
    assert variant.rows % 32 == 0
    assert 32 <= variant.rows <= 256  # of one matrix instruction
    accumulators = (
        variant.tiles * variant.rows // 2 * variant.limbs
    )  # with totals beside them where there are two limbs
    assert accumulators <= 128, "more do not fit the registers"
    assert variant.stages >= 2
    assert variant.shared_bytes + 1024 <= SHARED_BYTES[hopper]
    assert variant.stage_bytes % 1024 == 0, "tiles must begin at multiples of the swizzle's period"


@given(rows=st.integers(1, 10**5), variant=variants)
def test_tiles_waste_less_than_one_step_each(rows, variant):
    chosen = variant_for(variant.kind, variant.precision, rows, variant.hopper)
    tiles = -(-rows // chosen.rows)
    assert tiles * chosen.rows - rows < 32 * tiles


@given(rows=st.integers(0, 20000), variant=variants, budget=st.integers(1, 1 << 28))
def test_slabs_are_whole_tiles_and_cover_all_rows(rows, variant, budget):
    pieces = list(slabs(variant, rows, budget))
    assert [row for piece in pieces for row in piece] == list(range(rows))
    assert all(piece.start % variant.rows == 0 for piece in pieces)
    tile_bytes = variant.rows * SPAN * 2 * variant.limbs
    assert all(-(-len(piece) // variant.rows) * tile_bytes <= max(budget, tile_bytes) for piece in pieces)


@settings(max_examples=200)
@given(
    variant=variants,
    rows=st.integers(1, 3000),
    count=st.integers(1, 20000),
    start=st.integers(0, 2**45),
    columns=st.integers(1, 10**7),
    budget=st.integers(1 << 20, 1 << 28),
    resident=st.integers(1, 200),
)
def test_launches_cover_the_axis_at_fixed_cuts(variant, rows, count, start, columns, budget, resident):
    pieces = list(launches(variant, rows, count, start, columns, budget, resident))
    first, last = start // GROUP, -(-(start + columns) // GROUP)
    assert pieces[0].first_group == first
    assert sum(piece.groups for piece in pieces) == last - first
    row_bytes = -(-rows // variant.rows) * variant.rows * 2 * variant.limbs
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        stop = piece.first_group + piece.groups
        assert piece.groups > 0
        spans = {group // (SPAN // GROUP) for group in (piece.first_group, stop - 1)}
        assert piece.spans == max(spans) - min(spans) + 1
        assert piece.groups * GROUP * row_bytes <= max(budget, SPAN * row_bytes)
        if following is not None:
            assert following.first_group == stop
            assert stop % (SPAN // GROUP) == 0, "a cut within a span would change the order of summation"


@given(tiles=st.integers(1, 500), most=st.integers(1, 60), total=st.integers(1, 3000), resident=st.integers(1, 200))
def test_balanced_spans_are_never_slower_than_as_many_as_fit(tiles, most, total, resident):
    def rounds(step):
        steps = [step] * (total // step) + ([total % step] if total % step else [])
        return sum(-(-tiles * spans // resident) for spans in steps)

    step = balanced_spans(tiles, most, total, resident)
    assert 1 <= step <= max(1, min(most, total))
    assert rounds(step) <= rounds(min(most, total))


@pytest.mark.parametrize(
    ("kind", "rows", "tile"), [("rademacher", 640, 128), ("rademacher", 32, 32), ("gaussian", 640, 224)]
)
def test_the_targets_sizes_get_these_tiles(kind, rows, tile):
    assert variant_for(kind, "fast", rows, True).rows == tile


def test_memory_beside_gradients_and_features_stays_below_170_mb():
    variant = variant_for("rademacher", "fast", 640, True)
    pieces = list(launches(variant, 640, 10240, 0, 11_173_962, WORKSPACE_BYTES, 132))
    packed = max(piece.groups for piece in pieces) * GROUP * 640 * 2
    undo = max(piece.spans for piece in pieces) * 640 * 8
    turns = 2 * 5 * 40 * 4
    assert 2 * (packed + undo + turns) <= 170e6
