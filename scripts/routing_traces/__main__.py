"""Record which experts a model's tokens are routed to, and replay that over bank sizes.

    python scripts/routing_traces record MODEL OUT [--prompts FILE] [--max-tokens 128]
    python scripts/routing_traces replay TRACE [--share 0.25 ...] [--decode-only] [--json]

`record` answers prompts, one per line, each a conversation of its own; without a file, questions
that the demo model knows. `replay` prints the hit rates of LRU, of LFU (which banks use) and of
Belady's policy, which knows the future: nothing that must bring every miss in hits more.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from curve import SHARES, TraceReport, replay_sizes
from record import record_routing

from flashmoe import FlashMoEModel
from flashmoe.base.errors import FlashMoEError, OptionError
from flashmoe.base.units import format_count, format_size
from flashmoe.bench.prompts import QUESTIONS, read_prompts
from flashmoe.generation.session import Sampling, check_max_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="routing_traces", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    record = commands.add_parser("record", help="Answer prompts and record the routing.")
    record.set_defaults(run=run_record)
    record.add_argument("model", help="A store, a checkpoint folder or a Hub id.")
    record.add_argument("out", type=Path, help="The file to write.")
    record.add_argument("--prompts", type=Path, help="Prompts, one per line.")
    record.add_argument("--memory", help="Memory for the whole process, such as 24GB.")
    record.add_argument("--cache", help="Memory for the bank of experts alone.")
    record.add_argument("--max-tokens", type=int, default=128)
    record.add_argument("--temp", type=float, default=0.0)
    record.add_argument("--seed", type=int, default=0)
    record.add_argument("--no-template", action="store_true")
    replay = commands.add_parser("replay", help="Hit rates of a trace over bank sizes.")
    replay.set_defaults(run=run_replay)
    replay.add_argument("trace", type=Path, help="What record wrote.")
    replay.add_argument(
        "--share", type=float, action="append", help="A bank's share of all experts, 0 to 1."
    )
    replay.add_argument("--decode-only", action="store_true", help="Leave prompts' chunks out.")
    for command in (record, replay):
        command.add_argument("--json", action="store_true", help="Print one line of JSON.")
    asked = parser.parse_args()
    try:
        asked.run(asked)
    except FlashMoEError as error:
        fail(str(error), 2 if isinstance(error, OptionError) else 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)


def run_record(asked: argparse.Namespace) -> None:
    check_max_tokens(asked.max_tokens)
    sampling = Sampling(asked.temp, seed=asked.seed)
    prompts = QUESTIONS if asked.prompts is None else read_prompts(asked.prompts)
    sizes = {"memory": asked.memory, "cache": asked.cache}
    with FlashMoEModel.from_pretrained(asked.model, share=True, **sizes) as model:
        summary = record_routing(
            model,
            prompts,
            asked.out,
            max_tokens=asked.max_tokens,
            sampling=sampling,
            template=not asked.no_template,
        )
    if asked.json:
        print(json.dumps(asdict(summary)))
        return
    print(
        f"{summary.trace}: {summary.prompts} prompts, {summary.tokens} tokens "
        f"({summary.prompt_tokens} of prompts), {format_count(summary.accesses)} routed experts "
        f"in {summary.layers} layers, {format_size(summary.file_bytes)}"
    )


def run_replay(asked: argparse.Namespace) -> None:
    report = replay_sizes(asked.trace, shares=asked.share or SHARES, decode_only=asked.decode_only)
    if asked.json:
        print(json.dumps(asdict(report)))
        return
    print_report(report)


def print_report(report: TraceReport) -> None:
    print(
        f"{report.trace}: {report.model}, {report.prompts} prompts, {report.tokens} tokens, "
        f"{format_count(report.accesses)} accesses"
    )
    print("of all     bank        LRU     LFU  Belady  LFU's misses / Belady's")
    for size in report.sizes:
        share = "one token" if size.share is None else f"{size.share:.0%}"
        rates = (hits / report.accesses for hits in (size.lru, size.lfu, size.belady))
        # The first use of an expert is always a miss, so Belady's policy has some.
        misses = (report.accesses - size.lfu) / (report.accesses - size.belady)
        columns = "".join(f"{rate:8.1%}" for rate in rates)
        print(f"{share:<10} {format_size(size.bank_bytes):<7}{columns}  {misses:.2f}")


def fail(message: str, code: int) -> None:
    """Print a failure as one line and exit."""
    print(f"routing_traces: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
