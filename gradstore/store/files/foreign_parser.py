"""Run as a script, in a process of its own: print what an untrusted HDF5 file contains, without reading its data.

Output: JSON, dataset -> [shape, dtype, offset], or one string that names the first thing a feature file never has.
"""

from __future__ import annotations

import json
import resource
import sys

import h5py

_MEMORY = 1 << 30
_SECONDS = 10


class RefusedError(Exception):
    """The file contains what a feature file never does."""


def main(path: str) -> None:
    """Print the contents of one file."""
    try:
        found: object = contents(path)
    except (RefusedError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if "errno = " in str(error):  # the system's, which says nothing of the file
            raise
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
    print(json.dumps(found))


def confine() -> None:
    """Give up writing files, and all but a little memory and time."""
    for limit, value in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))


def contents(path: str) -> dict[str, list[object]]:
    """Every dataset of a file that has nothing but plain contiguous datasets in its root group."""
    with h5py.File(path, "r") as file:
        _require(file.id.get_create_plist().get_userblock() == 0, "a user block")
        _check_attributes(file.id)
        names: list[bytes] = []
        file.id.links.iterate(names.append)
        # Every link is judged before any object is opened: opening an external link opens another file.
        for name in names:
            _require(file.id.links.get_info(name).type == h5py.h5l.TYPE_HARD, f"a link that is not hard: {name!r}")
            _require(h5py.h5o.get_info(file.id, name).type == h5py.h5o.TYPE_DATASET, f"no dataset: {name!r}")
        return {name.decode(): _dataset(file.id, name) for name in names}


def _dataset(file: h5py.h5f.FileID, name: bytes) -> list[object]:
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_efile_prefix(b"/nonexistent")
    access.set_virtual_prefix(b"/nonexistent")
    dataset = h5py.h5d.open(file, name, access)
    plist = dataset.get_create_plist()
    _require(plist.get_layout() == h5py.h5d.CONTIGUOUS, f"{name!r} is not contiguous")
    _require(plist.get_nfilters() == 0, f"{name!r} has filters")
    _require(plist.get_external_count() == 0, f"{name!r} has external storage")
    _require(h5py.h5o.get_info(dataset).rc == 1, f"{name!r} has several names")
    kind = dataset.get_type()
    _require(not kind.committed() and kind.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT), f"the type of {name!r}")
    _require(dataset.shape == dataset.get_space().get_simple_extent_dims(True), f"{name!r} can grow")
    _check_attributes(dataset)
    return [list(dataset.shape), kind.dtype.str, dataset.get_offset()]


def _check_attributes(owner: h5py.h5g.GroupID | h5py.h5d.DatasetID) -> None:
    """Integers and fixed-length strings only: no references, no variable-length data, no named types."""
    count = h5py.h5a.get_num_attrs(owner)
    _require(count <= 4, "many attributes")
    for i in range(count):
        attribute = h5py.h5a.open(owner, index=i)
        kind = attribute.get_type()
        plain = kind.get_class() == h5py.h5t.INTEGER or (
            kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str()
        )
        _require(plain and not kind.committed() and attribute.shape == (), f"the attribute {attribute.name!r}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RefusedError(otherwise)


if __name__ == "__main__":
    confine()
    main(sys.argv[1])
