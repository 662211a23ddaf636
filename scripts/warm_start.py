"""What a warm start brings: time to the first token and the first tokens after it.

    python scripts/warm_start.py STORE --memory 3500MB [--pause 0 5] [--prompts FILE]

Every run is a process of its own, the page cache emptied before it where this user may. A first
one leaves behind what it had in its bank; then runs with and without take turns, with other
prompts, always after that first one. `--pause` is how long nothing is asked after loading, as
when somebody types. Without a file, prompts are random tokens. All runs answer with sampling.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from flashmoe import FlashMoEModel, Options, Sampling
from flashmoe.store.reader import open_store

COLUMNS = (
    "seconds_to_first_token",
    "tokens_per_second",
    "hit_rate",
    "warm_started",
    "warm_started_used",
    "bytes_read",
)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load, wait, answer one prompt."""
    options = Options(memory=job["memory"], cache=job["cache"], warm_start=job["warm"])
    with FlashMoEModel(open_store(job["store"]), options) as model:
        time.sleep(job["pause"])
        prompt: Any = job["prompt"]
        if prompt is None:
            draw = random.Random(job["seed"])
            vocabulary = len(model.tokenizer)
            prompt = [draw.randrange(vocabulary) for _ in range(job["prompt_tokens"])]
        started = time.perf_counter()
        stream = model.session().stream(
            prompt,
            max_new_tokens=job["tokens"],
            sampling=Sampling(temperature=1.0, seed=job["seed"]),
        )
        next(stream)
        first = time.perf_counter() - started
        before = model.totals()
        for _ in stream:
            pass
        spent = model.totals().since(before)
        stats = model.totals()
        return {
            "seconds_to_first_token": first,
            "tokens_per_second": spent.generated_tokens / max(spent.seconds.decode, 1e-9),
            "hit_rate": spent.hit_rate,
            "warm_started": stats.warm_started,
            "warm_started_used": stats.warm_started_used,
            "bytes_read": stats.bytes_read,
        }


def run_apart(job: dict[str, Any], home: Path) -> dict[str, Any]:
    """`run` in a process whose home folder is `home`, nothing in the page cache."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("the page cache stays as it is: emptying it needs root", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)],
        env={**os.environ, "HOME": str(home)},
        stdout=subprocess.PIPE,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(run(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store")
    parser.add_argument("--memory")
    parser.add_argument("--cache")
    parser.add_argument("--pause", type=float, nargs="+", default=[0.0, 5.0])
    parser.add_argument("--prompts", type=Path, help="one per line; the first one goes first")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    lines = args.prompts.read_text().splitlines() if args.prompts else None

    def job(number: int, warm: bool, pause: float) -> dict[str, Any]:
        return {
            "store": args.store,
            "memory": args.memory,
            "cache": args.cache,
            "warm": warm,
            "pause": pause,
            "prompt": None if lines is None else lines[number % len(lines)],
            "prompt_tokens": args.prompt_tokens,
            "tokens": args.tokens,
            "seed": number,
        }

    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first"
        run_apart(job(0, True, 0.0), first)
        for pause in args.pause:
            found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
            for number in range(1, args.rounds + 1):
                for warm in (False, True):
                    home = Path(folder) / "again"
                    shutil.rmtree(home, ignore_errors=True)
                    shutil.copytree(first, home)
                    found[warm].append(run_apart(job(number, warm, pause), home))
            for warm, results in found.items():
                told = [f"pause {pause:g} s, {'warm' if warm else 'cold'}:"]
                for name in COLUMNS:
                    values = sorted(result[name] for result in results)
                    told.append(f"{name} {median(values):.4g} ({values[0]:.4g}-{values[-1]:.4g})")
                print(" ".join(told), flush=True)


if __name__ == "__main__":
    main()
