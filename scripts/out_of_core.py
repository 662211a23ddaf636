"""Stream a model several times larger than the memory it is given, and say what that took.

Makes a random 4-bit checkpoint (routing is spread evenly, the hardest case for a cache),
repacks it, empties the page cache where it may, and decodes under `--memory`. On Linux as root,
`--cgroup` also puts the process into a memory cgroup of that size, which counts the page cache:
then every miss really comes from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_checkpoint import VOCABULARY, save_random_checkpoint

import flashmoe
from flashmoe import FlashMoEModel, Sampling, machine
from flashmoe.store.reader import open_store
from flashmoe.units import format_duration, format_size, parse_size

CGROUPS = Path("/sys/fs/cgroup/memory")
PROMPT_TOKENS = 16


def decode(store: str, memory: str, tokens: int, kernel: str) -> None:
    """Load, generate, and print one line of JSON; runs in a process of its own."""
    with FlashMoEModel(open_store(store), memory=memory, context=1024, kernel=kernel) as model:
        stream = model.session().stream(
            [(i * 7919) % VOCABULARY for i in range(PROMPT_TOKENS)],
            max_new_tokens=tokens,
            # Greedy decoding of a random model soon repeats itself, and so does its routing.
            sampling=Sampling(temperature=1.0, seed=0),
        )
        next(stream)
        before = model.stats()
        for _ in stream:
            pass
        spent = model.stats().since(before)
    report = {
        "tokens": spent.tokens,
        "decode_seconds": spent.seconds.decode,
        "reading_seconds": spent.seconds.reading,
        "hit_rate": spent.hit_rate,
        "bytes_read": spent.bytes_read,
        "bank_bytes": model.memory_plan.bank_bytes,
        "peak_bytes": machine.peak_resident_set_bytes(),
    }
    print(json.dumps(report))


def drop_page_cache() -> bool:
    """Empty the page cache, where this user may."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def limited(command: list[str], limit_bytes: int | None) -> str:
    """Run a command, inside a memory cgroup of `limit_bytes` when given; returns its output."""
    group = CGROUPS / f"out-of-core-{os.getpid()}"
    if limit_bytes is not None:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))

    def enter() -> None:
        if limit_bytes is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=enter
        )
    finally:
        if limit_bytes is not None:
            time.sleep(0.5)
            group.rmdir()
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--memory", default="600MB")
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--cgroup", metavar="SIZE", help="limit memory and page cache together")
    parser.add_argument("--folder", type=Path, help="keep the store here and reuse it")
    parser.add_argument("--decode", metavar="STORE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        decode(args.decode, args.memory, args.tokens, args.kernel)
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="out-of-core-"))
    try:
        store = folder / "store"
        if not store.exists():
            save_random_checkpoint(
                folder / "checkpoint", layers=args.layers, experts=args.experts, width=args.width
            )
            started = time.perf_counter()
            flashmoe.repack(folder / "checkpoint", store)
            print(f"repacked in {format_duration(time.perf_counter() - started)}")
            shutil.rmtree(folder / "checkpoint")
        streamed = flashmoe.inspect(store).streamed_bytes
        cold = drop_page_cache()
        command = [sys.executable, __file__, "--decode", str(store)]
        command += ["--memory", args.memory, "--tokens", str(args.tokens), "--kernel", args.kernel]
        limit = parse_size(args.cgroup) if args.cgroup else None
        report = json.loads(limited(command, limit))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    rate = report["tokens"] / report["decode_seconds"]
    reading = report["bytes_read"] / report["reading_seconds"]
    print(
        f"{format_size(streamed)} of experts, --memory {args.memory}, "
        f"page cache {'cold' if cold else 'as it was'}"
        f"{f', cgroup {args.cgroup}' if args.cgroup else ''}\n"
        f"peak memory {format_size(report['peak_bytes'])}, bank "
        f"{format_size(report['bank_bytes'])}, hit rate {report['hit_rate']:.0%}\n"
        f"{rate:.2f} tok/s; {format_size(report['bytes_read'] / report['tokens'])} read per token "
        f"at {format_size(reading)}/s; waiting for reads "
        f"{report['reading_seconds'] / report['decode_seconds']:.0%} of the time"
    )


if __name__ == "__main__":
    main()
