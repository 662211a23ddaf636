"""Take a model of full size through repacking, inspecting, verifying, loading and decoding.

    python scripts/scale_proof.py FOLDER --cgroup 20GB --memory 16GB
    python scripts/scale_proof.py FOLDER --published --cgroup 20GB --memory 16GB

The source is sparse (`sparse_source.py`): its experts take a hundredth of their size on the disk,
so holes are read at the speed of memory, and how long decoding takes says nothing. What is shown
is that nothing breaks at this number of layers, experts and bytes, how much memory it takes, and
that each expert that decoding needed was that of the source: its logits are held against those of
the same model with its experts computed out of the source (`source_experts.py`).

Each stage is a process of its own, in a memory cgroup (Linux, root) with `--cgroup`. Stages that
are done are not done again: what they gave is in FOLDER/stages.json. Run again, an interrupted
repack goes on; its time is then that of the last run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from source_experts import ExpertSource, NoExperts, SourceExperts, put_in_place

import flashmoe
from flashmoe import FlashMoEError, FlashMoEModel
from flashmoe.base import machine
from flashmoe.base.sparse_files import read_at
from flashmoe.base.units import format_duration, format_size, parse_size
from flashmoe.bench.cgroup import memory_cgroup
from flashmoe.cli.console import byte_progress
from flashmoe.repacking.repack import dry_run
from flashmoe.store.reader import open_store

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.support.synthetic.checkpoint import find_config, write_checkpoint
from tests.support.synthetic.sparse import (
    LARGE_BYTES,
    LARGE_SHARES,
    as_published,
    plan_sparse,
)

# Quantizing is slow, but for zeros: so many experts have one that is not zeros altogether.
PUBLISHED_STEP = 8
# Of so many experts' records, one is quantized again to be compared.
QUANTIZED_STEP = 32

Report = dict[str, Any]


def make_source(args: argparse.Namespace) -> Report:
    config = find_config(args.model)
    if args.published:
        plan = as_published(
            plan_sparse(config, layers=args.layers, bits=16, expert_step=PUBLISHED_STEP),
            args.large_bytes,
        )
    else:
        plan = plan_sparse(config, layers=args.layers)
    with byte_progress("writing") as progress:
        write_checkpoint(plan, args.folder / "source", progress)
    return {"tensors": len(plan.tensors), **sizes(args.folder / "source")}


def plan(args: argparse.Namespace) -> Report:
    return asdict(dry_run(args.folder / "source"))


def repack(args: argparse.Namespace) -> Report:
    with byte_progress("repacking") as progress:
        flashmoe.repack(args.folder / "source", args.folder / "store", progress=progress)
    return sizes(args.folder / "store")


def inspect(args: argparse.Namespace) -> Report:
    summary = flashmoe.inspect(args.folder / "store")
    manifest = args.folder / "store" / "flashmoe.json"
    return {
        "layers": len(summary.layers),
        "records": summary.records,
        "record_bytes": max(layer.record_bytes for layer in summary.layers),
        "resident_bytes": summary.resident_bytes,
        "streamed_bytes": summary.streamed_bytes,
        "manifest_bytes": manifest.stat().st_size,
    }


def records(args: argparse.Namespace) -> Report:
    """Records byte for byte beside what the source has: all of them, or those of a few experts
    where these must be quantized for it."""
    store, experts = open_store(args.folder / "store"), ExpertSource(args.folder / "source")
    step = QUANTIZED_STEP if args.published else 1
    compared = different = 0
    for number, layer in enumerate(store.manifest.layers):
        layout = layer.layout
        record = memoryview(bytearray(layout.record.stride))
        with store.file(layout.file).open("rb", buffering=0) as file:
            for expert in range(number % step, layout.n_experts, step):
                filled = 0
                while filled < len(record):
                    filled += read_at(file, record[filled:], layout.record_offset(expert) + filled)
                expected = experts.record(layout, expert)
                compared += 1
                different += any(
                    # Views of memory are compared one byte at a time.
                    bytes(record[component.offset : component.end])
                    != bytes(expected[component.name])
                    for component in layout.record.components
                )
    return {"records_compared": compared, "records_different": different}


def verify(args: argparse.Namespace) -> Report:
    with byte_progress("verifying") as progress:
        return asdict(flashmoe.verify(args.folder / "store", progress))


def decode(args: argparse.Namespace) -> Report:
    """Greedy decoding through a session, then the same tokens fed again to be compared."""
    begun = time.monotonic()
    context = args.prompt_tokens + args.tokens + 1
    store = open_store(args.folder / "store")
    with FlashMoEModel(store, memory=args.memory, context=context, warm_start=False) as model:
        loaded = time.monotonic()
        vocabulary = len(model.tokenizer)
        prompt = [(i * 7919) % (vocabulary // LARGE_SHARES) for i in range(args.prompt_tokens)]
        used: set[tuple[int, int]] = set()
        model.observe_routing(
            lambda layer, experts: used.update((layer, int(e)) for e in np.unique(experts))
        )
        stream = model.session().stream(prompt, max_new_tokens=args.tokens + 1)
        answer = [piece.token for piece in stream if piece.token is not None]
        model.observe_routing(None)
        spent = model.totals()
        report = {
            "load_seconds": loaded - begun,
            "tokens": spent.generated_tokens,
            "prompt_seconds": spent.seconds.prefill,
            "decode_seconds": spent.seconds.decode,
            "records_used": len(used),
            "hit_rate": spent.hit_rate,
            "bytes_read": spent.bytes_read,
            "bank_bytes": model.bank_bytes,
            "decode_peak_bytes": machine.peak_resident_set_bytes(),
        }
        return {**report, **compare(model, args.folder / "source", prompt, answer[: args.tokens])}


def compare(
    model: FlashMoEModel, source: Path, prompt: Sequence[int], answer: Sequence[int]
) -> Report:
    """The largest differences of any logit, in units of the largest logit: to the model with its
    experts computed out of the source, and to the one without routed experts."""
    streamed = logits(model, prompt, answer)
    paths = {layer.layout.path: layer.layout for layer in model.store.manifest.layers}
    experts = ExpertSource(source)
    for path, layout in paths.items():
        packing = layout.projections["gate_proj"]
        put_in_place(model.model, path, SourceExperts(experts, path, packing))
    expected = logits(model, prompt, answer)
    for path in paths:
        put_in_place(model.model, path, NoExperts())
    without = logits(model, prompt, answer)
    scale = np.abs(expected).max()
    return {
        "compared_steps": len(expected),
        "finite": bool(np.isfinite(streamed).all()),
        "difference": float(np.abs(streamed - expected).max() / scale),
        "difference_without_experts": float(np.abs(without - expected).max() / scale),
        "same_greedy_tokens": int((streamed.argmax(-1) == expected.argmax(-1)).sum()),
    }


def logits(model: FlashMoEModel, prompt: Sequence[int], answer: Sequence[int]) -> Any:
    """Float32 [1 + answer tokens, vocabulary]: after the prompt, fed at once, and each token."""
    cache = make_prompt_cache(model.model)
    rows = []
    for tokens in (prompt, *([token] for token in answer)):
        result = model.model(mx.array(tokens)[None], cache=cache)
        rows.append(np.array(result[0, -1].astype(mx.float32)))
    return np.stack(rows)


def sizes(folder: Path) -> Report:
    status = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return {
        "files": len(status),
        "apparent_bytes": sum(s.st_size for s in status),
        "disk_bytes": sum(s.st_blocks * 512 for s in status),
    }


STAGES: dict[str, Callable[[argparse.Namespace], Report]] = {
    "source": make_source,
    "plan": plan,
    "repack": repack,
    "inspect": inspect,
    "decode": decode,
    "records": records,
    "verify": verify,
}


def run_stage(name: str, args: argparse.Namespace) -> Report:
    """One stage in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", name]
    with contextlib.ExitStack() as stack:
        entrance = None
        if args.cgroup:
            entrance = stack.enter_context(memory_cgroup(parse_size(args.cgroup)))

        def enter() -> None:
            if entrance is not None:
                entrance.write_text(str(os.getpid()))

        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    if done.returncode:
        print(f"error: the stage {name} ended with {done.returncode}", file=sys.stderr)
        sys.exit(1)
    report: Report = json.loads(done.stdout)
    return report


def measured(name: str, args: argparse.Namespace) -> Report:
    begun = time.monotonic()
    report = STAGES[name](args)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.monotonic() - begun,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_bytes": machine.peak_resident_set_bytes(),
        **report,
    }


def print_table(reports: dict[str, Report]) -> None:
    print(f"{'stage':<8} {'time':>8} {'processor':>10} {'peak memory':>12}")
    for name, report in reports.items():
        print(
            f"{name:<8} {format_duration(report['seconds']):>8} "
            f"{format_duration(report['processor_seconds']):>10} "
            f"{format_size(report['peak_memory_bytes']):>12}"
        )
    print()
    for name, report in reports.items():
        for key, value in report.items():
            if key in ("seconds", "processor_seconds", "peak_memory_bytes", "parts"):
                continue
            is_size = key.endswith("_bytes") or key == "bytes_read"
            text = f"{format_size(value)} ({value:,} bytes)" if is_size else str(value)
            print(f"{name}: {key.replace('_', ' ')}: {text}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where source and store go")
    parser.add_argument(
        "--model",
        default="qwen3.5-397b-a17b",
        help="a preset (default: qwen3.5-397b-a17b) or a config.json",
    )
    parser.add_argument("--layers", type=int, help="keep this many layers (default: all)")
    parser.add_argument(
        "--published",
        action="store_true",
        help="a bfloat16 source in Qwen's own layout, not a 4-bit one in mlx-lm's",
    )
    parser.add_argument("--memory", default="16GB", help="for decoding; default: 16GB")
    parser.add_argument("--prompt-tokens", type=int, default=4, help="default: 4")
    parser.add_argument("--tokens", type=int, default=4, help="decode steps; default: 4")
    parser.add_argument("--cgroup", metavar="SIZE", help="limit memory and page cache together")
    parser.add_argument(
        "--large-bytes", type=int, default=LARGE_BYTES, help="above it, a tensor is made in part"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    try:
        if args.stage:
            print(json.dumps(measured(args.stage, args)))
            return
        args.folder.mkdir(parents=True, exist_ok=True)
        kept = args.folder / "stages.json"
        reports: dict[str, Report] = json.loads(kept.read_text()) if kept.is_file() else {}
        for name in STAGES:
            if name not in reports:
                reports[name] = run_stage(name, args)
                kept.write_text(json.dumps(reports, indent=1))
    except FlashMoEError as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps(reports))
    else:
        print_table(reports)


if __name__ == "__main__":
    main()
