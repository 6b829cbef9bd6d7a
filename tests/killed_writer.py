"""Run as a script: a warmed-up server that forks a process for each line on stdin, so that tests can kill hundreds.

Each line is a JSON list of {"job": name, ...}. The server answers with the pids, then with their exit statuses.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from faulty_disk import NoLockDisk, slow, without_flock
from small_store import ROWS, N, columns, data, fill, plan, write

from gradstore.errors import GradstoreError
from gradstore.store import store_writer
from gradstore.store.files.disk import Disk
from gradstore.store.store_writer import open_writer


def write_slowly(path: str, n: int, shard_rows: int, acks: str, **_: Any) -> None:
    """Write a store, and note each shard that was reported stored."""
    notes = os.open(acks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store_writer._LINES = 3  # so that a journal of a few lines is written anew as a manifest
    write(Path(path), n, slow(0.0003), lambda index: os.write(notes, b"%d\n" % index), shard_rows)


def append_naively(path: str, n: int, acks: str, **_: Any) -> None:
    """The control: rows appended to an open HDF5 file."""
    notes = os.open(acks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with h5py.File(path, "a") as file:
        features = file.get("features")
        if features is None:
            features = file.create_dataset("features", (0, 2, 12), "f2", maxshape=(None, 2, 12), chunks=(4, 2, 12))
        for i in range(len(features), n):
            features.resize(i + 1, axis=0)
            features[i] = ROWS[i]["features"]
            time.sleep(0.0003)
            os.write(notes, b"%d\n" % i)


def hold(path: str, said: str, locks: bool, flock: bool = True, **_: Any) -> None:
    """Try to be the writer; say so, or why not; hold on until the file `said + .go` is there."""
    try:
        disk = (Disk() if flock else without_flock()) if locks else NoLockDisk()
        with open_writer(Path(path), plan(N), disk, data) as writer:
            say(said, f"won {os.getpid()}")
            while not Path(said + ".go").exists():
                time.sleep(0.002)
            fill(writer)
    except GradstoreError as error:
        say(said, f"exit {error.exit_code}: {error}")


def write_one(path: str, kind: str, letter: str, source: str, seconds: float = 0.001, **_: Any) -> None:
    """Write one output of a kind, slowly."""
    import outputs

    outputs.WRITERS[kind](Path(path), letter, slow(seconds), Path(source))


def run_command(arguments: list[str], stderr: str, shard_flops: float, folder: str = ".", **_: Any) -> None:
    """A whole command, as from the shell, with small shards."""
    os.chdir(folder)
    import gradstore_cli

    import gradstore.featurization.plan

    gradstore.featurization.plan._SHARD_FLOPS = {"cpu": shard_flops}
    fd = os.open(stderr, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(fd, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        gradstore_cli.main(arguments)
    finally:  # a signal that comes now finds the command ended: it must not hit what follows, which no shell has
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def say(said: str, line: str) -> None:
    fd = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{line}\n".encode())
    os.close(fd)


JOBS = {job.__name__: job for job in (write_slowly, append_naively, hold, write_one, run_command)}


def child(order: dict[str, Any]) -> None:
    status = 1
    try:
        JOBS[order["job"]](**{name: value for name, value in order.items() if name != "job"})
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    columns(range(2))
    np.random.default_rng(0)
    for job in sys.argv[1:]:  # what else to warm up
        __import__(job)
    answer(ready=True)
    for line in sys.stdin:
        orders = json.loads(line)
        pids = []
        for order in orders:
            pid = os.fork()
            if pid == 0:
                child(order)
            pids.append(pid)
        answer(pids=pids)
        answer(statuses=[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])


def answer(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
