"""Measures this machine's roofs: how fast a torch program can read memory and multiply matrices here at best.

    python -m bench.roofs [--json FILE] [--quick]

Every benchmark prints them beside its own figures, and says what share of them it reached. They are the roofs that a
torch program can reach, not the limits of the memory bus or of the registers. Products in bf16 are oneDNN's; those in
fp32 come from the BLAS that torch was built with (MKL in its wheels for x86-64).
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from bench.result import Figure, add_arguments, bench_result, report
from policies.precision import compute_dtype, short_name

Reader = Callable[[Tensor], Tensor]

# Larger than the last cache of any CPU now made, so that it is read from memory. Quick runs read from the cache.
_MEMORY_BYTES, _QUICK_MEMORY_BYTES = 2**30, 2**20
# Square matrices: small ones are not split well among threads, large ones leave the caches.
_SIZES, _QUICK_SIZES = (512, 1024, 2048, 3072), (64,)
REPETITIONS = 4
# What training computes in on this machine's CPU.
CPU_DTYPE = compute_dtype(torch.device("cpu"))
# A CPU without instructions for bf16 multiplies it so slowly that larger matrices would take minutes, and show no more.
_SLOW_SECONDS = 0.5
# Reductions that read every value once. Which is fastest depends on the CPU.
READERS: tuple[Reader, ...] = (torch.sum, torch.amax, torch.linalg.vector_norm)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    report(bench_result("roofs", roofs(arguments.quick)), arguments.json)


def roofs(quick: bool = False) -> list[Figure]:
    """Returns the roofs, measured in a few seconds: GB/s of memory read, GFLOP/s of matrix products.

    A value is the best of all repetitions; `low` and `high` are the spread of the repetitions that did it the best way.
    `quick` measures something too small to mean anything. Uses as many threads as torch is set to, and leaves that as
    it was.
    """
    values = torch.ones((_QUICK_MEMORY_BYTES if quick else _MEMORY_BYTES) // 4)
    with num_threads(1):
        alone = memory_read("memory read, 1 thread", values)
    together = memory_read("memory read, all threads", values)
    del values
    sizes = _QUICK_SIZES if quick else _SIZES
    return [
        alone,
        together,
        matrix_product("matrix product, fp32", sizes, torch.float32),
        matrix_product("matrix product, bf16", sizes, torch.bfloat16),
    ]


def matmul_roof(measured: Sequence[Figure]) -> Figure:
    """Returns, from what `roofs` returned, the products in the precision that training computes in."""
    name = f"matrix product, {short_name(CPU_DTYPE)}"
    return next(figure for figure in measured if figure.name == name)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Lets torch use `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_read(name: str, values: Tensor) -> Figure:
    """Returns the rate at which `values` can be read, in GB/s (10⁹ bytes)."""
    ways = [repeat(partial(read, values)) for read in READERS]
    return best(name, "GB/s", [[values.nbytes / seconds / 1e9 for seconds in way] for way in ways])


def matrix_product(name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Figure:
    """Returns the rate of torch.matmul on square matrices of the best of `sizes`, in GFLOP/s: 2 n³ for a product."""
    ways = []
    for size in sizes:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        seconds = repeat(partial(torch.matmul, a, b))
        ways.append([2 * size**3 / each / 1e9 for each in seconds])
        if min(seconds) > _SLOW_SECONDS:
            break
    return best(name, "GFLOP/s", ways)


def repeat(run: Callable[[], Tensor]) -> list[float]:
    """Returns the seconds of each of REPETITIONS calls of `run`, after one that does not count."""
    run()
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


def best(name: str, unit: str, ways: list[list[float]]) -> Figure:
    """Returns the best rate of the best way, with the spread of that way's repetitions."""
    rates = max(ways, key=max)
    return Figure(name, max(rates), unit, min(rates), max(rates))


if __name__ == "__main__":
    main()
