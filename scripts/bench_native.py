"""Speed of the native CPU kernels beside MLX's gather_qmm and the memory's bandwidth.

4-bit weights, group 64, random; one matrix per slot. "decode" gives each of many slots one row
(their weights together exceed every cache), "prefill" gives a few slots 32 rows each.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from flashmoe import native

SHAPES = {"Qwen3.5-397B up": (1024, 4096), "Qwen3-30B up": (768, 2048), "Qwen3-30B down": (2048, 768)}
BITS, GROUP_SIZE = 4, 64
WORKING_SET_BYTES = 600_000_000
PREFILL_SLOTS, PREFILL_ROWS = 8, 32


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
    target = np.empty_like(source)
    cuts = np.linspace(0, len(source), native.threads() + 1).astype(int)

    def everywhere(work: Callable[[slice], object]) -> Callable[[], None]:
        def run() -> None:
            parts = [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
            workers = [threading.Thread(target=work, args=(part,)) for part in parts]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        return run

    copying = best_seconds(everywhere(lambda part: np.copyto(target[part], source[part])), 4)
    reading = best_seconds(everywhere(lambda part: source[part].max()), 4)
    return {"memcpy": source.nbytes / copying / 1e9, "read": source.nbytes / reading / 1e9}


def random_weights(n_slots: int, rows: int, cols: int, dtype: mx.Dtype) -> list[mx.array]:
    rng = np.random.default_rng(0)
    weight = mx.array(rng.integers(0, 2**32, (n_slots, rows, cols * BITS // 32), np.uint32))
    scales = mx.array(rng.random((n_slots, rows, cols // GROUP_SIZE), np.float32) * 0.01)
    arrays = [weight, scales.astype(dtype), (scales * -7.5).astype(dtype)]
    mx.eval(arrays)
    return arrays


def measure(label: str, shape: tuple[int, int], isas: list[str], with_mlx: bool) -> list[dict]:
    rows, cols = shape
    results = []
    slot_bytes = rows * cols * BITS // 8 + rows * cols // GROUP_SIZE * 2 * 4
    many = -(-WORKING_SET_BYTES // slot_bytes)
    phases = {"decode": (many, 1), "prefill": (PREFILL_SLOTS, PREFILL_ROWS)}
    for dtype, dtype_name in ((mx.float32, "f32"), (mx.bfloat16, "bf16")):
        weights = random_weights(many, rows, cols, dtype)
        matrix = native.matrix(*weights, bits=BITS, group_size=GROUP_SIZE)
        bytes_per_slot = sum(array.nbytes for array in weights) / many
        for phase, (n_slots, per_slot) in phases.items():
            slots = np.repeat(np.arange(n_slots, dtype=np.int32), per_slot)
            x = np.random.default_rng(1).standard_normal((len(slots), cols), np.float32)
            out = np.empty((len(slots), rows), np.float32)

            def add(
                kernel: str,
                seconds: float,
                phase: str = phase,
                n_slots: int = n_slots,
                per_slot: int = per_slot,
                dtype_name: str = dtype_name,
                bytes_per_slot: float = bytes_per_slot,
            ) -> None:
                macs = n_slots * per_slot * rows * cols
                results.append(
                    {
                        "shape": f"{cols}x{rows}",
                        "model": label,
                        "phase": phase,
                        "scales": dtype_name,
                        "kernel": kernel,
                        "gweights_per_s": macs / seconds / 1e9,
                        "gbytes_per_s": n_slots * bytes_per_slot / seconds / 1e9,
                    }
                )

            for isa in isas:
                native.use_isa(isa)
                run = lambda: native.matmul(x, matrix, slots, out=out)  # noqa: B023, E731
                run()
                add(isa, best_seconds(run, 5))
            if with_mlx and dtype == mx.float32:
                xs, ids = mx.array(x)[:, None], mx.array(slots)
                mx.eval(xs, ids)
                run = lambda: mx.eval(  # noqa: E731
                    mx.gather_qmm(
                        xs,  # noqa: B023
                        *weights,  # noqa: B023
                        rhs_indices=ids,  # noqa: B023
                        transpose=True,
                        group_size=GROUP_SIZE,
                        bits=BITS,
                    )
                )
                add("mlx gather_qmm", best_seconds(run, 2))
        del weights, matrix
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", nargs="+", help="instruction sets, default the best")
    parser.add_argument("--no-mlx", action="store_true", help="leave out MLX, which is slow")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    bandwidth = memory_bandwidth()
    isas = options.isa or [native.isa()]
    results = []
    for label, shape in SHAPES.items():
        results += measure(label, shape, isas, not options.no_mlx)
    if options.json:
        print(json.dumps({"threads": native.threads(), "bandwidth": bandwidth, "results": results}))
        return
    print(
        f"{native.threads()} threads; memory: copies {bandwidth['memcpy']:.1f} GB/s, "
        f"reads {bandwidth['read']:.1f} GB/s"
    )
    columns = f"{'model':<16} {'in x out':<10} {'phase':<8} {'scales':<6} {'kernel':<15}"
    print(f"{columns} {'G weights/s':>11} {'GB/s':>6} {'of read':>8}")
    for r in results:
        share = f"{r['gbytes_per_s'] / bandwidth['read']:.0%}" if r["phase"] == "decode" else ""
        print(
            f"{r['model']:<16} {r['shape']:<10} {r['phase']:<8} {r['scales']:<6} "
            f"{r['kernel']:<15} {r['gweights_per_s']:>11.1f} {r['gbytes_per_s']:>6.1f} {share:>8}"
        )


if __name__ == "__main__":
    main()
