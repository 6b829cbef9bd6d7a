"""Run as a script, in a confined process: print what an untrusted HDF5 file contains, without reading its data.

Output: JSON, {"datasets": dataset -> [shape, dtype, offset], "attributes": name -> value}; or one string that names the
first thing that no file of gradstore's ever has; or {"unreadable": what HDF5 says}.
"""

from __future__ import annotations

import json
import sys

import h5py
import numpy as np

_ATTRIBUTES = {"file": 32, "dataset": 4}


class RefusedError(Exception):
    """The file contains what none of gradstore's ever does."""


def main(path: str) -> None:
    """Print the contents of one file."""
    try:
        found: object = contents(path)
    except RefusedError as error:
        found = str(error)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if "errno = " in str(error):  # the system's, which says nothing of the file
            raise
        found = {"unreadable": str(error).splitlines()[0] if str(error) else type(error).__name__}
    print(json.dumps(found))


def contents(path: str) -> dict[str, dict[str, object]]:
    """Every dataset of a file that has nothing but plain contiguous datasets in its root group, and its attributes."""
    with h5py.File(path, "r") as file:
        _require(file.id.get_create_plist().get_userblock() == 0, "a user block")
        attributes = _attributes(file.id, _ATTRIBUTES["file"])
        names: list[bytes] = []
        file.id.links.iterate(names.append)
        # Every link is judged before any object is opened: opening an external link opens another file.
        for name in names:
            _require(file.id.links.get_info(name).type == h5py.h5l.TYPE_HARD, f"a link that is not hard: {name!r}")
            _require(h5py.h5o.get_info(file.id, name).type == h5py.h5o.TYPE_DATASET, f"no dataset: {name!r}")
        return {"datasets": {name.decode(): _dataset(file.id, name) for name in names}, "attributes": attributes}


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
    _attributes(dataset, _ATTRIBUTES["dataset"])
    return [list(dataset.shape), kind.dtype.str, dataset.get_offset()]


def _attributes(owner: h5py.h5g.GroupID | h5py.h5d.DatasetID, most: int) -> dict[str, object]:
    """Integers and fixed-length strings only: no references, no variable-length data, no named types."""
    count, found = h5py.h5a.get_num_attrs(owner), {}
    _require(count <= most, "many attributes")
    for i in range(count):
        attribute = h5py.h5a.open(owner, index=i)
        kind = attribute.get_type()
        plain = kind.get_class() == h5py.h5t.INTEGER or (
            kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str()
        )
        _require(plain and not kind.committed() and attribute.shape == (), f"the attribute {attribute.name!r}")
        value = np.zeros((), kind.dtype)
        attribute.read(value)
        found[attribute.name.decode()] = value.tolist().decode() if value.dtype.kind == "S" else int(value)
    return found


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RefusedError(otherwise)


if __name__ == "__main__":
    main(sys.argv[1])
