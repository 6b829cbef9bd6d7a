"""F2: the N-th I/O call fails, once or for good."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Record
from faulty_disk import WatchedDisk, failing
from small_store import files, write, wrong_rows

from gradstore.errors import GradstoreError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files import shard_writer
from gradstore.store.verify import verify

pytestmark = pytest.mark.soak
KINDS = [("EIO", False), ("EIO", True), ("ENOSPC", False), ("ENOSPC", True), ("EINTR", False), ("EINTR", True)]


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Iterator[None]:
    """The system is asked after every group to begin moving it to the medium, so that this call fails too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "_UNHURRIED", 1)
        yield


def history(path: Path, disk: WatchedDisk) -> None:
    """Every kind of writing: create, then append to a short last shard."""
    write(path, n=12, disk=disk)
    write(path, n=18, disk=disk)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    disk, path = WatchedDisk(), tmp_path_factory.mktemp("whole") / "store"
    history(path, disk)
    return files(path), disk.calls


@pytest.mark.parametrize(("kind", "for_good"), [*KINDS, ("short", False), ("short", True)])
def test_every_call_may_fail(
    kind: str, for_good: bool, whole: tuple[dict[str, bytes], int], fast: Path, tmp_path: Path, record: Record
) -> None:
    expected, calls = whole
    refused = unclear = 0
    for at in range(1, calls + 1):
        path = fast / "store"
        disk = failing(at, kind, for_good)
        try:
            history(path, disk)
        except GradstoreError as error:
            refused += 1
            unclear += "\n" in str(error) or error.exit_code not in (5, 7)
        if (path / "store.json").exists():
            assert wrong_rows(FeatureStore(path)) == []
        write(path, n=18)
        assert files(path) == expected
        shutil.rmtree(path)
    assert unclear == 0
    assert refused == 0 if kind == "short" or (kind, for_good) == ("EINTR", False) else refused > calls / 2
    control = control_ignores_short_writes(tmp_path) if kind == "short" else control_hides_the_failure(tmp_path)
    what = f"{kind} at every call, {'from then on' if for_good else 'once'}"
    record("F2", what, injected=calls, recovered=calls - refused, refused=refused, silent=0, control=control)


def control_ignores_short_writes(tmp_path: Path) -> str:
    """A writer that trusts one `pwrite` leaves a file that is not what it wrote."""
    import os

    path = tmp_path / "naive"
    disk = failing(1, "short", True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    disk._pwrite(fd, memoryview(b"x" * 1000), 0)
    os.close(fd)
    assert path.stat().st_size == 500
    return "one write call without a loop: half of the bytes missing, no error"


def control_hides_the_failure(tmp_path: Path) -> str:
    """A writer that goes on after a failed write reports success for a store that lacks the bytes."""

    def swallow(name: str, arguments: tuple[object, ...]) -> object:
        # Some writes of the first shard claim to be done.
        return len(arguments[1]) if name == "_pwrite" and 40 < disk.calls < 60 else None  # type: ignore[arg-type]

    disk = WatchedDisk(swallow)
    path = tmp_path / "swallowed"
    write(path, disk=disk)
    damaged = verify(path).damaged_rows
    assert damaged
    return f"errors ignored: {len(damaged)} rows reported stored are not, found by their digests"
