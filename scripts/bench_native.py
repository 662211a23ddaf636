"""Speed of the native CPU kernels beside MLX's gather_qmm and the memory's bandwidth.

4-bit weights, group 64, random; one matrix per slot. "decode" gives each of many slots one row
(their weights together exceed every cache), "prefill" gives a few slots 32 rows each.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from flashmoe import native

# Outputs and inputs of one expert's projection.
SHAPES = {
    "Qwen3.5-397B up": (1024, 4096),
    "Qwen3-30B up": (768, 2048),
    "Qwen3-30B down": (2048, 768),
}
SCALES = {"f32": mx.float32, "bf16": mx.bfloat16}
BITS, GROUP_SIZE = 4, 64
WORKING_SET_BYTES = 600_000_000
PREFILL_SLOTS, PREFILL_ROWS = 8, 32


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    model: str
    shape: str
    phase: str
    scales: str
    kernel: str
    gweights_per_s: float
    gbytes_per_s: float


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def memory_bandwidth() -> dict[str, float]:
    """GB/s copied (counted once) and read, by as many threads as the kernels use."""
    source = np.ones(WORKING_SET_BYTES // 8)
    target = np.zeros_like(source)
    cuts = np.linspace(0, len(source), native.threads() + 1).astype(int)

    def everywhere(work: Callable[[slice], object]) -> None:
        parts = [threading.Thread(target=work, args=(slice(a, b),)) for a, b in pairwise(cuts)]
        for part in parts:
            part.start()
        for part in parts:
            part.join()

    def copy(part: slice) -> None:
        np.copyto(target[part], source[part])

    def read(part: slice) -> None:
        source[part].max()

    copying = best_seconds(lambda: everywhere(copy), 4)
    reading = best_seconds(lambda: everywhere(read), 4)
    return {"memcpy": source.nbytes / copying / 1e9, "read": source.nbytes / reading / 1e9}


@dataclass(frozen=True)
class Bench:
    """Random weights of one shape, and how fast products with them are."""

    model: str
    rows: int
    cols: int
    scales: str

    def weights(self) -> list[mx.array]:
        rng = np.random.default_rng(0)
        values = self.rows * self.cols
        scale_bytes = SCALES[self.scales].size
        slot_bytes = values * BITS // 8 + 2 * scale_bytes * values // GROUP_SIZE
        n_slots = -(-WORKING_SET_BYTES // slot_bytes)
        words = (n_slots, self.rows, self.cols * BITS // 32)
        scales = rng.random((n_slots, self.rows, self.cols // GROUP_SIZE), np.float32) * 0.01
        arrays = [mx.array(rng.integers(0, 2**32, words, np.uint32))]
        arrays += [mx.array(a).astype(SCALES[self.scales]) for a in (scales, scales * -7.5)]
        mx.eval(arrays)
        return arrays

    def run(self, isas: list[str], with_mlx: bool) -> Iterator[Result]:
        weights = self.weights()
        n_slots = len(weights[0])
        yield from self.phase("decode", weights, n_slots, 1, isas, with_mlx)
        yield from self.phase("prefill", weights, PREFILL_SLOTS, PREFILL_ROWS, isas, with_mlx)

    def phase(
        self,
        name: str,
        weights: list[mx.array],
        n_slots: int,
        per_slot: int,
        isas: list[str],
        with_mlx: bool,
    ) -> Iterator[Result]:
        matrix = native.matrix(*weights, bits=BITS, group_size=GROUP_SIZE)
        slots = np.repeat(np.arange(n_slots, dtype=np.int32), per_slot)
        x = np.random.default_rng(1).standard_normal((len(slots), self.cols), np.float32)
        out = np.empty((len(slots), self.rows), np.float32)

        def result(kernel: str, seconds: float) -> Result:
            products = len(slots) * self.rows * self.cols
            read = n_slots * sum(a.nbytes // len(a) for a in weights)
            shape = f"{self.cols}x{self.rows}"
            rates = products / seconds / 1e9, read / seconds / 1e9
            return Result(self.model, shape, name, self.scales, kernel, *rates)

        for isa in isas:
            native.use_isa(isa)
            native.matmul(x, matrix, slots, out=out)
            yield result(isa, best_seconds(lambda: native.matmul(x, matrix, slots, out=out), 5))
        if with_mlx and self.scales == "f32":
            xs, ids = mx.array(x)[:, None], mx.array(slots)
            packing = {"transpose": True, "bits": BITS, "group_size": GROUP_SIZE}
            mx.eval(xs, ids)

            def stock() -> None:
                mx.eval(mx.gather_qmm(xs, *weights, rhs_indices=ids, **packing))

            yield result("mlx gather_qmm", best_seconds(stock, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", nargs="+", help="instruction sets, default the best")
    parser.add_argument("--no-mlx", action="store_true", help="leave out MLX, which is slow")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    bandwidth = memory_bandwidth()
    isas = options.isa or [native.isa()]
    results = [
        result
        for model, (rows, cols) in SHAPES.items()
        for scales in SCALES
        for result in Bench(model, rows, cols, scales).run(isas, not options.no_mlx)
    ]
    if options.json:
        rows = [asdict(result) for result in results]
        print(json.dumps({"threads": native.threads(), "bandwidth": bandwidth, "results": rows}))
        return
    print(
        f"{native.threads()} threads; memory: copies {bandwidth['memcpy']:.1f} GB/s, "
        f"reads {bandwidth['read']:.1f} GB/s"
    )
    columns = f"{'model':<16} {'in x out':<10} {'phase':<8} {'scales':<6} {'kernel':<15}"
    print(f"{columns} {'G weights/s':>11} {'GB/s':>6} {'of read':>8}")
    for r in results:
        share = f"{r.gbytes_per_s / bandwidth['read']:.0%}" if r.phase == "decode" else ""
        print(
            f"{r.model:<16} {r.shape:<10} {r.phase:<8} {r.scales:<6} {r.kernel:<15} "
            f"{r.gweights_per_s:>11.1f} {r.gbytes_per_s:>6.1f} {share:>8}"
        )


if __name__ == "__main__":
    main()
