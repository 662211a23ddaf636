"""Stream a model several times larger than the memory it is given, and say what that took.

Decodes with random sampling in a process of its own, after emptying the page cache where it may.
On Linux as root, `--cgroup` also puts that process into a memory cgroup, which counts the page
cache: then every miss really comes from the disk. What this has beside `flashmoe bench decode` is
a prompt of any length, held against decoding token by token and against plain sequential reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import flashmoe
from flashmoe import FlashMoEError, FlashMoEModel, Sampling
from flashmoe.base import machine
from flashmoe.base.units import format_size, parse_size
from flashmoe.bench.cgroup import memory_cgroup
from flashmoe.cli.console import byte_progress
from flashmoe.io.plain import plain_rate
from flashmoe.kernels.select import resolve_kernel
from flashmoe.store.reader import Store, is_store, open_store

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.support.synthetic.checkpoint import find_config, plan_checkpoint, write_checkpoint

# Of a file that is read from front to back.
PIECE_BYTES = 2**20

Report = dict[str, Any]


def decode(store: str, args: argparse.Namespace) -> Report:
    """Load and generate; what happened until the first token (`prompt_...`) and after it."""
    memory, prompt_tokens, tokens, kernel = (
        args.memory,
        args.prompt_tokens,
        args.tokens,
        args.kernel,
    )
    context = prompt_tokens + tokens
    opened = open_store(store)
    sequential = {}
    if args.sequential:
        sequential["sequential_bytes_per_second"] = sequential_rate(opened, args.sequential_seconds)
    with FlashMoEModel(opened, memory=memory, context=context, kernel=kernel) as model:
        vocabulary = len(model.tokenizer)
        stream = model.session().stream(
            [(i * 7919) % vocabulary for i in range(prompt_tokens)],
            max_new_tokens=tokens,
            # Greedy decoding of a random model soon repeats itself, and so does its routing.
            sampling=Sampling(temperature=1.0, seed=0),
        )
        next(stream)
        before = model.totals()
        read = model._running.readers[0].counters
        for _ in stream:
            pass
        spent = model.totals().since(before)
        chunk = model.memory_plan.prompts.chunk_tokens
        bank_bytes = model.bank_bytes
        page_cache = model.page_cache
    return {
        "kernel": resolve_kernel(kernel),
        "tokens": spent.generated_tokens,
        "tokens_per_second": spent.generated_tokens / spent.seconds.decode,
        "hit_rate": spent.hit_rate,
        "bytes_read_per_token": spent.bytes_read / spent.generated_tokens,
        "waiting_share": spent.seconds.phases.reading / spent.seconds.decode,
        "prompt_tokens": before.prompt_tokens,
        "prompt_chunk_tokens": chunk,
        "prompt_seconds": before.seconds.prefill,
        "prompt_seconds_waiting": before.seconds.phases.reading,
        "prompt_bytes_read": before.bytes_read,
        "prompt_bytes_per_second": read.bytes / read.busy_seconds if read.busy_seconds else 0.0,
        "page_cache": page_cache,
        **sequential,
        "bank_bytes": bank_bytes,
        "peak_memory_bytes": machine.peak_resident_set_bytes(),
    }


def sequential_rate(store: Store, seconds: float) -> float:
    """Bytes per second that the records' files give from front to back, past the page cache, to
    the number of plain threads that pays most; each number has `seconds`."""
    paths = [store.file(layer.layout.file) for layer in store.manifest.layers]
    places = [
        (path, offset) for path in paths for offset in range(0, path.stat().st_size, PIECE_BYTES)
    ]
    return max(
        plain_rate(places, PIECE_BYTES, threads, seconds, page_cache=False)
        for threads in (1, 2, 4, 8)
    )


def drop_page_cache() -> bool:
    """Empty the page cache, where this user may."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def run_decode(store: Path, args: argparse.Namespace) -> Report:
    """One cold run in a process of its own."""
    command = [sys.executable, __file__, "--decode", str(store), "--memory", args.memory]
    command += ["--prompt-tokens", str(args.prompt_tokens), "--tokens", str(args.tokens)]
    command += ["--kernel", args.kernel, "--sequential-seconds", str(args.sequential_seconds)]
    command += ["--sequential"] if args.sequential else []
    with contextlib.ExitStack() as stack:
        cold = not args.keep_page_cache and drop_page_cache()
        entrance = None
        if args.cgroup:
            entrance = stack.enter_context(memory_cgroup(parse_size(args.cgroup)))

        def enter() -> None:
            if entrance is not None:
                entrance.write_text(str(os.getpid()))

        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    if done.returncode == -signal.SIGKILL:
        sys.exit(f"error: the run was killed; is --cgroup {args.cgroup} below --memory?")
    if done.returncode:
        sys.exit(done.returncode)
    report: Report = json.loads(done.stdout)
    return {"cold": cold, **report}


def prepare_store(args: argparse.Namespace, folder: Path) -> Store:
    """The store of `--model`, made in `folder` when it is none yet."""
    if is_store(Path(args.model)):
        return open_store(args.model)
    store = folder / "store"
    if is_store(store):
        return open_store(store)
    checkpoint = Path(args.model)
    if not any(checkpoint.glob("*.safetensors")):
        checkpoint = folder / "checkpoint"
        plan = plan_checkpoint(find_config(args.model), layers=args.layers)
        with byte_progress("writing") as progress:
            write_checkpoint(plan, checkpoint, progress)
    with byte_progress("repacking") as progress:
        made = flashmoe.repack(checkpoint, store, progress=progress)
    if checkpoint == folder / "checkpoint":
        shutil.rmtree(checkpoint)
    return made


def print_reports(store: Store, args: argparse.Namespace, reports: list[Report]) -> None:
    cold = all(report["cold"] for report in reports)
    print(
        f"{format_size(store.manifest.streamed_bytes)} of experts, --memory {args.memory}, "
        f"page cache {'cold' if cold else 'as it was'}"
        f"{f', cgroup {args.cgroup}' if args.cgroup else ''}, {reports[0]['tokens']} tokens"
    )
    rates = [report["tokens_per_second"] for report in reports]
    spread = f" ({min(rates):.2f} to {max(rates):.2f})" if len(reports) > 1 else ""
    middle = {
        key: median(report[key] for report in reports)
        for key, value in reports[0].items()
        if isinstance(value, int | float)
    }
    print(
        f"kernel {reports[0]['kernel']}: {median(rates):.2f} tok/s{spread}\n"
        f"  peak memory {format_size(middle['peak_memory_bytes'])}, "
        f"bank {format_size(middle['bank_bytes'])}, hit rate {middle['hit_rate']:.0%}, "
        f"{format_size(middle['bytes_read_per_token'])} read per token\n"
        f"  waiting for reads {middle['waiting_share']:.0%} of the time\n"
        f"  prompt of {middle['prompt_tokens']:.0f} tokens "
        f"in {middle['prompt_seconds']:.2f} s, "
        f"{middle['prompt_seconds_waiting']:.2f} s of it waiting for reads, "
        f"{format_size(middle['prompt_bytes_read'])} read\n"
        f"  {middle['prompt_tokens'] / middle['prompt_seconds']:.1f} tok/s, "
        f"{prompt_gain(middle):.1f} times as fast as token by token; "
        f"reading {format_size(middle['prompt_bytes_per_second'])}/s"
        f"{sequential_share(middle)}"
    )


def prompt_gain(run: Report) -> float:
    """How many times as fast a token of the prompt was as one that is decoded."""
    rate: float = run["prompt_tokens"] / run["prompt_seconds"]
    return rate / float(run["tokens_per_second"])


def sequential_share(run: Report) -> str:
    """The rate of the prompt's reads as a share of the files' own, where that was measured."""
    rate = run.get("sequential_bytes_per_second")
    if rate is None:
        return ""
    share = run["prompt_bytes_per_second"] / rate
    return f", {share:.0%} of the {format_size(rate)}/s that the files give in order"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model",
        default="qwen3-30b-a3b",
        help="a store, a checkpoint folder, or what make_synthetic.py makes one from: a preset "
        "(default: qwen3-30b-a3b) or a config.json",
    )
    parser.add_argument("--layers", type=int, default=16, help="of a model made here; default: 16")
    parser.add_argument("--memory", default="3500MB", help="default: 3500MB")
    parser.add_argument("--tokens", type=int, default=33, help="default: 33")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="default: 16")
    parser.add_argument("--kernel", default="auto", help="default: auto")
    parser.add_argument("--cgroup", metavar="SIZE", help="limit memory and page cache together")
    parser.add_argument(
        "--sequential", action="store_true", help="compare the prompt's reads with plain ones"
    )
    parser.add_argument("--folder", type=Path, help="keep a store made here, and reuse it")
    parser.add_argument("--rounds", type=int, default=1, help="runs; default: 1")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--keep-page-cache", action="store_true", help="do not empty it first")
    parser.add_argument(
        "--sequential-seconds",
        type=float,
        default=2.0,
        help="for each number of plain threads; default: 2",
    )
    parser.add_argument("--decode", metavar="STORE", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    try:
        if args.decode:
            report = decode(args.decode, args)
            print(json.dumps(report))
            return
        parse_size(args.memory)
        with contextlib.ExitStack() as stack:
            folder = args.folder or Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="out-of-core-"))
            )
            store = prepare_store(args, folder)
            reports = [run_decode(store.path, args) for _ in range(args.rounds)]
    except FlashMoEError as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps({"streamed_bytes": store.manifest.streamed_bytes, "runs": reports}))
    else:
        print_reports(store, args, reports)


if __name__ == "__main__":
    main()
