"""Run by bench_exact.py in an environment of its own: the same network's trNTK⁰ by neural_tangents, timed."""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np


def main() -> None:
    data = np.load(sys.argv[1])
    images = jnp.asarray(data["images"])
    keys = [key for key in data.files if key != "images"]
    numbers = sorted({int(key.split(".")[0]) for key in keys})
    params = [(jnp.asarray(data[f"{i}.weight"]), jnp.asarray(data[f"{i}.bias"])) for i in numbers]
    seconds = {}
    for name in ("JACOBIAN_CONTRACTION", "STRUCTURED_DERIVATIVES"):
        kernel = nt.empirical_ntk_fn(
            logits,
            trace_axes=(-1,),
            diagonal_axes=(),
            vmap_axes=0,
            implementation=nt.NtkImplementation[name],
        )
        batched = nt.batch(kernel, batch_size=max(size for size in range(1, 51) if len(images) % size == 0))
        np.asarray(batched(images, None, params))  # compiles
        began = time.perf_counter()
        value = np.asarray(batched(images, None, params))
        seconds[name] = time.perf_counter() - began
    np.save(sys.argv[2], value * data[f"{numbers[-1]}.bias"].size)  # neural_tangents averages over the traced axis
    print(json.dumps(seconds))


def logits(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    for i, (weight, bias) in enumerate(params[:-1]):
        x = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        x = jax.nn.relu(x + bias[:, None, None])
        if i > 0:  # pooling follows the second and the third convolution
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    weight, bias = params[-1]
    return x.reshape(len(x), -1) @ weight.T + bias


if __name__ == "__main__":
    main()
