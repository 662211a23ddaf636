"""How many weights per second each method of quantizing packs, beside rounding to nearest.

    python scripts/quantize_rate.py

Wall-clock and per core in use (processor time of the whole process), medians over rounds; the
methods take turns. `mlx` is the fit with MLX's own operations, which is what GPUs run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from flashmoe import native
from flashmoe.kernels.packing import pack_codes
from flashmoe.repacking import hqq
from flashmoe.repacking.quantize import pack
from flashmoe.repacking.recipe import Setting


def methods(bits: int, group_size: int) -> dict[str, Callable[[mx.array], object]]:
    """What evaluates a packed weight, by name."""

    def by_mlx(weight: mx.array) -> None:
        groups = weight.reshape(-1, group_size)
        step = hqq.CPU_CHUNK // (group_size * len(hqq.STARTS[bits]))
        for first in range(0, groups.shape[0], step):
            codes, scales, biases = hqq.fit(groups[first : first + step], bits)
            mx.eval(pack_codes(codes, bits), scales, biases)

    found: dict[str, Callable[[mx.array], object]] = {
        method: lambda w, m=method: mx.eval(pack(w, Setting(bits, group_size, method=m)))
        for method in ("rtn", "hqq")
    }
    return {**found, "mlx": by_mlx}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON lines instead")
    args = parser.parse_args()

    where = "natively" if native.available() is None else str(native.available())
    device = mx.default_device()
    if not args.json:
        print(f"{device}; hqq {where if device == mx.cpu else 'by MLX'}; M weights/s\n")
        print(f"{'bits':>4} {'method':<6} {'wall':>8} {'per core':>9}")
    for bits in hqq.STARTS:
        weight = (0.02 * mx.random.normal((8, 1024, 256))).astype(mx.bfloat16)
        mx.eval(weight)
        walls: dict[str, list[float]] = {}
        cores: dict[str, list[float]] = {}
        for _ in range(args.rounds + 1):
            for name, run in methods(bits, args.group_size).items():
                wall, core = time.perf_counter(), time.process_time()
                run(weight)
                walls.setdefault(name, []).append(weight.size / (time.perf_counter() - wall) / 1e6)
                cores.setdefault(name, []).append(weight.size / (time.process_time() - core) / 1e6)
        for name in walls:
            # The first round warms up.
            rates = [statistics.median(values[name][1:]) for values in (walls, cores)]
            if args.json:
                row = {"bits": bits, "method": name, "wall": rates[0], "per_core": rates[1]}
                print(json.dumps(row), flush=True)
            else:
                print(f"{bits:>4} {name:<6} {rates[0]:>8.1f} {rates[1]:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
