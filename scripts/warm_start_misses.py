"""What a warm start leaves to be read: misses of questions that share no fact with those before.

    python scripts/demo_model/questions.py tune.txt report.txt
    python scripts/warm_start_misses.py --before tune.txt --prompts report.txt [--model STORE]

One run answers the first questions of `--before` and leaves behind what its bank held. Then every
question of `--prompts` is asked of a model loaded anew, without a warm start and with one, always
after that first run. Answers are greedy. A bank is a share of all experts. Counts, no times:
`warm_start.py` has those.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from lossy_cost import bank_bytes

from flashmoe import FlashMoEModel
from flashmoe.engine.model_cache import open_model
from flashmoe.store.reader import Store


@dataclass(frozen=True)
class Answered:
    """What one answer counted: in its prompt, in the tokens behind it, and by the warm start."""

    prompt_misses: int
    misses: int
    hits: int
    warm_started: int
    warm_started_used: int


def ask(model: FlashMoEModel, question: str, tokens: int) -> Answered:
    """One answer; of `tokens` after the first."""
    pieces = model.stream(question, max_new_tokens=tokens + 1)
    next(pieces)
    prompt = model.totals()
    for _ in pieces:
        pass
    stats = model.totals()
    decode = stats.since(prompt)
    return Answered(
        prompt.misses, decode.misses, decode.hits, stats.warm_started, stats.warm_started_used
    )


def ask_anew(
    store: Store, cache: int, questions: Sequence[str], tokens: int, kept: Path, *, warm: bool
) -> list[Answered]:
    """Each question asked of a model of its own that finds in its home folder what `kept` has."""
    found = []
    for question in questions:
        with tempfile.TemporaryDirectory() as home:
            shutil.copytree(kept, home, dirs_exist_ok=True)
            os.environ["HOME"] = home
            with FlashMoEModel(store, cache=cache, warm_start=warm) as model:
                found.append(ask(model, question, tokens))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="default: the demo")
    parser.add_argument("--before", type=Path, required=True, help="one question per line")
    parser.add_argument("--prompts", type=Path, required=True, help="one question per line")
    parser.add_argument("--before-questions", type=int, default=30)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.5])
    args = parser.parse_args()

    before = args.before.read_text().splitlines()[: args.before_questions]
    questions = args.prompts.read_text().splitlines()[: args.questions]
    store = open_model(args.model)
    print(
        f"| bank | warm | misses of the prompt | misses of {args.tokens} tokens | "
        "hit rate of these | warm_started | of them used |"
    )
    print("|---|---|---|---|---|---|---|")
    for share in args.share:
        cache = bank_bytes(store, share)
        with tempfile.TemporaryDirectory() as kept:
            os.environ["HOME"] = kept
            with FlashMoEModel(store, cache=cache, warm_start=True) as model:
                for question in before:
                    ask(model, question, args.tokens)
            for warm in (False, True):
                found = ask_anew(store, cache, questions, args.tokens, Path(kept), warm=warm)
                hits = sum(answered.hits for answered in found)
                rate = hits / (hits + sum(answered.misses for answered in found))
                print(
                    f"| {share:.0%} | {'yes' if warm else 'no'} | "
                    f"{mean(answered.prompt_misses for answered in found):.1f} | "
                    f"{mean(answered.misses for answered in found):.1f} | {rate:.1%} | "
                    f"{mean(answered.warm_started for answered in found):.1f} | "
                    f"{mean(answered.warm_started_used for answered in found):.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
