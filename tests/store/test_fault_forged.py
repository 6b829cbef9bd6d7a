"""S2 and S3: forged headers, swapped files and hostile names are refused; nothing leaves the directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import Record
from small_store import N, plan, write, wrong_rows

from gradstore.errors import CorruptError, UnsafeError, UsageError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.layout import gaps
from gradstore.store.files.manifest import MANIFEST, Manifest
from gradstore.store.files.manifest_file import read_manifest
from gradstore.store.verify import verify


@pytest.fixture
def store(fast: Path) -> Path:
    write(fast / "store")
    return fast / "store"


def sealed(content: dict[str, Any]) -> bytes:
    """A manifest whose digest is right, whatever it says."""
    content = {name: value for name, value in content.items() if name != "digest"}
    body = json.dumps(content)[:-1]
    return f'{body},\n "digest": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def reseal(path: Path, change: Callable[[Manifest], Manifest]) -> None:
    (path / MANIFEST).write_bytes(change(read_manifest(path, Disk())).to_bytes())


def with_header_of(manifest: Manifest, path: Path, index: int) -> Manifest:
    """The manifest of a forger, who makes it agree with whatever file there is."""
    shard = next(s for s in manifest.shards if s.index == index)
    content = (path / manifest.file_of(index)).read_bytes()
    digest = hashlib.sha256()
    for start, stop in gaps(manifest.schema.columns, shard.rows, shard.offsets, len(content)):
        digest.update(content[start:stop])
    return manifest.with_shard(replace(shard, size=len(content), header=digest.hexdigest()))


def forge(path: Path, build: Callable[[h5py.File], None]) -> None:
    """Replace shard 1 by an HDF5 file with the same rows at the same places, and other things in its header."""
    file = path / read_manifest(path, Disk()).file_of(1)
    with h5py.File(file, "r+", libver=("v110", "v110")) as content:
        build(content)
    reseal(path, lambda manifest: with_header_of(manifest, path, 1))


def external_storage(file: h5py.File) -> None:
    del file["preview"]
    file.create_dataset("preview", (8, 4), "u1", external=[("/etc/passwd", 0, 32)])


def virtual(file: h5py.File, source: str = "/etc/other.h5") -> None:
    del file["preview"]
    layout = h5py.VirtualLayout((8, 4), "u1")
    layout[:] = h5py.VirtualSource(source, "x", (8, 4))
    file.create_virtual_dataset("preview", layout)


def replaced(**options: Any) -> Callable[[h5py.File], None]:
    def build(file: h5py.File) -> None:
        del file["preview"]
        file.create_dataset("preview", **{"shape": (8, 4), "dtype": "u1", **options})

    return build


def plugin_filter(file: h5py.File) -> None:
    del file["preview"]
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_chunk((8, 4))
    options.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (1, 2))
    h5py.h5d.create(file.id, b"preview", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((8, 4)), options)


def committed_type(file: h5py.File) -> None:
    file["type"] = np.dtype("u1")


def relinked(file: h5py.File, target: Any) -> None:
    del file["label"]
    file["label"] = target


FORGERIES: dict[str, Callable[[h5py.File], Any]] = {
    "external storage": external_storage,
    "virtual dataset": virtual,
    "virtual dataset of itself": lambda file: virtual(file, "."),
    "external link": lambda file: file.__setitem__("more", h5py.ExternalLink("/etc/other.h5", "/x")),
    "soft link": lambda file: file.__setitem__("more", h5py.SoftLink("/features")),
    "soft link in place of a dataset": lambda file: (
        file.__delitem__("label"),
        file.__setitem__("label", h5py.SoftLink("/row")),
    ),
    "second hard link": lambda file: file.__setitem__("more", file["label"]),
    "hard link in place of a dataset": lambda file: relinked(file, file["row"]),
    "gzip": replaced(compression="gzip", chunks=(8, 4)),
    "plug-in filter": plugin_filter,
    "fletcher32": replaced(fletcher32=True, chunks=(8, 4)),
    "chunked": replaced(chunks=(4, 4)),
    "shape bomb": replaced(shape=(1 << 40, 1 << 20), chunks=(1, 1024)),
    "growing": replaced(maxshape=(None, 4), chunks=(8, 4)),
    "another rank": replaced(shape=(8, 2, 2)),
    "another type": replaced(dtype="i1"),
    "compound type": replaced(dtype=np.dtype([("a", "u1"), ("b", "u1")])),
    "variable-length strings": replaced(shape=(8,), dtype=h5py.string_dtype()),
    "object references": replaced(shape=(8,), dtype=h5py.ref_dtype),
    "a group": lambda file: file.create_group("more"),
    "a named type": committed_type,
    "another dataset": lambda file: file.create_dataset("more", data=[1]),
    "a reference attribute": lambda file: file.attrs.__setitem__("more", file["row"].ref),
    "a missing dataset": lambda file: file.__delitem__("preview"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_headers_are_refused_before_data_is_touched(name: str, store: Path, record: Record) -> None:
    forge(store, FORGERIES[name])
    opened = FeatureStore(store)
    assert opened.read(0, 8)["row"].tolist() == list(range(8))  # the shard beside it is as it was
    with pytest.raises(UnsafeError, match="the header of this shard holds other things than a feature file") as error:
        opened.read(8, 9)
    assert error.value.exit_code == 9
    assert verify(store).damaged_rows == tuple(range(8, 16))
    write(store)
    assert FeatureStore(store).read(8, 9)["row"] == [8]
    why = "HDF5 alone: external storage returns another file's bytes"
    record("S2", "forged HDF5 headers", injected=1, recovered=0, refused=1, silent=0, control=why)


def test_what_a_forged_header_would_read_elsewhere(store: Path, fast: Path) -> None:
    """The control: HDF5 itself follows external storage to another file and returns its bytes."""
    secret = fast / "secret"
    secret.write_bytes(b"top secret, top secret, 32 bytes")
    file = store / "shard-00001.h5"
    with h5py.File(file, "r+") as content:
        del content["preview"]
        content.create_dataset("preview", (8, 4), "u1", external=[(str(secret), 0, 32)])
    with h5py.File(file) as content:
        assert content["preview"][:].tobytes() == secret.read_bytes()


def test_a_plain_header_of_another_hdf5_is_accepted(store: Path) -> None:
    manifest = read_manifest(store, Disk())
    with h5py.File(store / "shard-00001.h5", "r+", libver=("v110", "v110")) as file:
        file["label"].attrs["meaning"] = np.bytes_(b"another wording")
    reseal(store, lambda _: with_header_of(manifest, store, 1))
    assert FeatureStore(store).read(0, N)["row"].tolist() == list(range(N))
    assert verify(store).ok


def swap(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


SWAPPED = "pipes, links and folders in the place of a store's files"
PLAINLY_OPENED = "opened as it stands: a link leads to another file, and a pipe waits for ever"
SWAPS: dict[str, Callable[[Path], Any]] = {
    "symbolic link": lambda path: path.symlink_to("/etc/passwd"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to a copy": lambda path: path.symlink_to(path.with_suffix(".copy")),
    "pipe": os.mkfifo,
    "directory": os.mkdir,
}


@pytest.mark.parametrize("name", SWAPS)
@pytest.mark.parametrize("file", ["shard-00000.h5", MANIFEST])
def test_only_regular_files_are_read(file: str, name: str, store: Path, record: Record) -> None:
    shutil.copy(store / file, (store / file).with_suffix(".copy"))
    swap(store / file, SWAPS[name])
    with pytest.raises((UnsafeError, UsageError), match=r"symbolic link|not a regular file|Is a directory"):
        FeatureStore(store).read(0, 1)
    assert name == "pipe" or reads_what_stands_there(store / file)
    record("S3", SWAPPED, injected=1, recovered=0, refused=1, silent=0, control=PLAINLY_OPENED)


def reads_what_stands_there(path: Path) -> bool:
    """The control: whether an ordinary `open` would read another file, or end in an error without a code."""
    try:
        return bool(path.read_bytes()) and path.is_symlink()
    except OSError:
        return True


HOSTILE = [
    "x" * 300,
    "..",
    "../other",
    "/etc/passwd",
    "/tmp/../etc/x",
    "a/../../b",
    "C:\\x",
    "\\\\host\\share",
    "CON",
    "a\0b",
    "x" * 300,
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["split", "preview", "file"])
def test_no_name_in_a_manifest_leads_elsewhere(field: str, name: str, store: Path, record: Record) -> None:
    content = json.loads((store / MANIFEST).read_bytes())
    (content["shards"][0] if field == "file" else content)[field] = name
    (store / MANIFEST).write_bytes(sealed(content))
    opened: list[Path] = []

    class Watching(Disk):
        def _open(self, path: Path, flags: int) -> int:
            opened.append(path)
            return super()._open(path, flags)

    refused = 1
    with suppress(CorruptError):
        assert wrong_rows(FeatureStore(store, disk=Watching())) == []
        refused = 0
    assert {path.parent for path in opened} == {store}
    note_hostile_name(record, refused)


def note_hostile_name(record: Record, refused: int) -> None:
    out = sum(leads_out(name) for name in HOSTILE)
    why = f"file names taken from the manifest: {out} of {len(HOSTILE)} lead out of the store"
    record("S3", "hostile names", injected=1, recovered=1 - refused, refused=refused, silent=0, control=why)


def leads_out(name: str) -> bool:
    """Whether a path joined with a name, as a naive reader would, is outside of its folder."""
    folder = Path("/store")
    return folder not in (Path(os.path.normpath(folder / name)), *Path(os.path.normpath(folder / name)).parents)


def test_hostile_names_would_lead_out() -> None:
    """The control."""
    assert [leads_out(name) for name in ("shard-00000.h5", "..", "/etc/passwd", "a/../../b")] == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "link", "file", "folder", "link/inside/deep\0"])
def test_no_output_is_written_elsewhere(name: str, fast: Path, record: Record) -> None:
    elsewhere = fast / "elsewhere"
    elsewhere.mkdir()
    (fast / "link").symlink_to(elsewhere)
    (fast / "file").write_text("mine")
    (fast / "folder").mkdir()
    (fast / "folder/thesis.txt").write_text("mine")
    with pytest.raises(UsageError) as error:
        write(fast / name)
    assert error.value.exit_code == 2
    assert list(elsewhere.iterdir()) == []
    assert sorted(p.name for p in fast.iterdir()) == ["elsewhere", "file", "folder", "link"]
    assert [p.name for p in (fast / "folder").iterdir()] == ["thesis.txt"]
    note_hostile_name(record, 1)


@pytest.mark.parametrize(
    "leftover", [".shard-00000.h5.tmp", ".store.json.tmp", ".store.journal.tmp", ".lock", "run.jsonl"]
)
def test_a_link_left_in_the_directory_is_not_written_through(leftover: str, fast: Path, record: Record) -> None:
    victim = fast / "victim"
    victim.write_text("precious")
    (fast / "store").mkdir()
    (fast / "store" / leftover).symlink_to(victim)
    refused = 1
    with suppress(UnsafeError):
        write(fast / "store")
        Disk().append_line(fast / "store/run.jsonl", "{}")
        refused = 0
    assert victim.read_text() == "precious"
    record("S3", SWAPPED, injected=1, recovered=1 - refused, refused=refused, silent=0, control=PLAINLY_OPENED)


def test_names_of_a_shard_come_from_its_number() -> None:
    assert [plan(30).file_of(i) for i in range(4)] == [*(f"shard-0000{i}.h5" for i in range(3)), "shard-00003-6.h5"]
