"""Hold a long conversation at several memory budgets, and say how much memory that really took.

    python scripts/memory_over_chat.py STORE --memory 1500MB --memory 2GB --memory 3GB

Each budget has a process of its own. The questions are random tokens and answers are sampled,
so that routing does not repeat itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from typing import Any

from flashmoe import FlashMoEError, FlashMoEModel, Sampling
from flashmoe.base import machine
from flashmoe.base.units import format_size, parse_size
from flashmoe.store.reader import open_store

Report = dict[str, Any]


def hold_chat(store: str, memory: str, args: argparse.Namespace) -> Report:
    """One conversation in this process."""
    ids: list[int] = []
    residents: list[int] = []
    banks: list[int] = []
    asked, answered = args.question_tokens, args.answer_tokens
    with FlashMoEModel(open_store(store), memory=memory, context=args.context) as model:
        vocabulary = len(model.tokenizer)
        session = model.session()
        started = time.perf_counter()
        for turn in range(args.context // (asked + answered)):
            ids += [(7919 * i + turn) % vocabulary for i in range(asked)]
            sampling = Sampling(temperature=1.0, seed=turn)
            for piece in session.stream(ids, max_new_tokens=answered, sampling=sampling):
                ids += [] if piece.token is None else [piece.token]
                residents.append(machine.resident_set_bytes())
                banks.append(model.bank_bytes)
        seconds = time.perf_counter() - started
        model.check_integrity()
        stats = model.totals()
        plan = model.memory_plan
    resizes = sum(a != b for a, b in itertools.pairwise(banks))
    return {
        "total_bytes": parse_size(memory),
        "peak_bytes": machine.peak_resident_set_bytes(),
        "median_bytes": sorted(residents)[len(residents) // 2],
        "bank_bytes": [plan.bank_bytes, min(banks), max(banks), banks[-1]],
        "kv_bytes": plan.kv_bytes,
        "tokens": len(ids),
        "resizes": resizes,
        "seconds": seconds,
        "decode_tokens_per_second": stats.generated_tokens / stats.seconds.decode,
        "hit_rate": stats.hit_rate,
    }


def describe(report: Report) -> str:
    total = report["total_bytes"]
    planned, least, most, last = map(format_size, report["bank_bytes"])
    return (
        f"--memory {format_size(total)}: peak {report['peak_bytes'] / total:.2%}, "
        f"median {report['median_bytes'] / total:.2%} of it over {report['tokens']} tokens\n"
        f"  bank {planned} at the start, {least} to {most}, {last} at the end, "
        f"{report['resizes']} changes; KV cache {format_size(report['kv_bytes'])} in the end\n"
        f"  {report['decode_tokens_per_second']:.2f} tok/s, hit rate {report['hit_rate']:.0%}, "
        f"{report['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store")
    parser.add_argument("--memory", action="append", metavar="SIZE", required=True)
    parser.add_argument("--context", type=int, default=4096, help="default: 4096")
    parser.add_argument("--question-tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--answer-tokens", type=int, default=192, help="default: 192")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each budget")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for memory in args.memory:
        if args.here:
            try:
                print(json.dumps(hold_chat(args.store, memory, args)))
            except FlashMoEError as error:
                sys.exit(f"error: {error}")
            continue
        command = [sys.executable, __file__, args.store, "--here", "--memory", memory]
        for name in ("context", "question-tokens", "answer-tokens"):
            command += [f"--{name}", str(getattr(args, name.replace("-", "_")))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        print(done.stdout.strip() if args.json else describe(json.loads(done.stdout)), flush=True)


if __name__ == "__main__":
    main()
