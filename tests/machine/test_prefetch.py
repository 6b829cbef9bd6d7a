"""Reading ahead: the same items in their order, errors in their place, and a thread that ends with the loop."""

from __future__ import annotations

import threading
import time

import pytest

from gradstore.machine.prefetch import prefetched


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "gradstore-prefetch"]


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("stop", [1, 2, 3, 9])
def test_a_loop_gets_its_items_and_leaves_no_thread(n: int, stop: int) -> None:
    found, items = [], prefetched(lambda i: i * i, range(n))
    for item in items:
        found.append(item)
        if len(found) == stop:
            break
    items.close()  # type: ignore[attr-defined]
    assert found == [(i, i * i) for i in range(n)][:stop]
    assert threads() == []


def test_one_item_is_held_and_one_is_being_made() -> None:
    made: list[int] = []
    items = prefetched(lambda i: made.append(i) or i, range(9))
    next(items)
    time.sleep(0.2)
    assert made == [0, 1, 2]
    items.close()  # type: ignore[attr-defined]


def test_an_error_comes_where_its_item_would_have() -> None:
    items = prefetched(lambda i: 6 // (3 - i), range(9))
    assert [next(items)[1] for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert threads() == []
