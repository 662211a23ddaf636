"""What the lossy options cost in accuracy, and what they gain.

    python scripts/demo_model/questions.py tune.txt report.txt
    python scripts/lossy_cost.py --prompts report.txt [--model STORE] [--questions 60]

The exact model answers greedily; then every variant is fed the same prompt and answer token by
token, and its next-token probabilities are compared with the exact ones: Kullback-Leibler
divergence in nats (exact to variant), and how often both have the same likeliest token. Hits,
bytes and speed are of these tokens, the prompts left out. A bank is a share of all experts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from flashmoe import FlashMoEModel
from flashmoe.base.units import format_size
from flashmoe.engine.model_cache import open_model
from flashmoe.generation.prompt import encode_prompt
from flashmoe.memory.budget import layer_demands
from flashmoe.store.reader import Store

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Text:
    """A prompt and the exact model's answer, with its log-probabilities [n, vocabulary]."""

    prompt: list[int]
    answer: list[int]
    exact: Floats


def log_probabilities(model: FlashMoEModel, tokens: list[int], cache: list[Any]) -> Floats:
    logits = model.model(mx.array([tokens]), cache=cache)[0, -1].astype(mx.float32)
    found: Floats = np.array(logits - mx.logsumexp(logits))
    return found


def answer(model: FlashMoEModel, question: str, most: int) -> Text:
    """The exact model's greedy answer."""
    prompt = encode_prompt(model.tokenizer, question)
    cache = make_prompt_cache(model.model)
    told: list[int] = []
    rows = [log_probabilities(model, prompt, cache)]
    while len(told) < most and (token := int(rows[-1].argmax())) not in (
        model.tokenizer.eos_token_ids
    ):
        told.append(token)
        rows.append(log_probabilities(model, [token], cache))
    return Text(prompt, told, np.stack(rows))


def measure(model: FlashMoEModel, texts: list[Text]) -> dict[str, float]:
    """Divergence over all answer tokens, and what decoding them took."""
    divergences, agreements, hits, misses, bytes_read = [], [], 0, 0, 0
    seconds = 0.0
    for text in texts:
        cache = make_prompt_cache(model.model)
        rows = [log_probabilities(model, text.prompt, cache)]
        before, started = model.totals(), time.perf_counter()
        rows += [log_probabilities(model, [token], cache) for token in text.answer]
        seconds += time.perf_counter() - started
        spent = model.totals().since(before)
        hits, misses = hits + spent.hits, misses + spent.misses
        bytes_read += spent.bytes_read
        found = np.stack(rows)
        divergences += (np.exp(text.exact) * (text.exact - found)).sum(axis=-1).tolist()
        agreements += (found.argmax(-1) == text.exact.argmax(-1)).tolist()
    tokens = sum(len(text.answer) for text in texts)
    return {
        "mean": float(np.mean(divergences)),
        "p99": float(np.percentile(divergences, 99)),
        "agreement": float(np.mean(agreements)),
        "hit_rate": hits / max(hits + misses, 1),
        "bytes_per_token": bytes_read / tokens,
        "tokens_per_second": tokens / seconds,
    }


def bank_bytes(store: Store, share: float) -> int:
    """The bank that has room for this share of all experts."""
    demands = layer_demands([layer.layout.unit for layer in store.manifest.layers], widen=False)
    return sum(round(demand.most * share) * demand.slot_bytes for demand in demands)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="default: the demo")
    parser.add_argument("--prompts", type=Path, required=True, help="one per line")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--experts-per-token", type=int, nargs="*", default=[1])
    parser.add_argument("--route-bias", type=float, nargs="*", default=[0.25, 0.5, 1.0, 2.0])
    args = parser.parse_args()

    questions = args.prompts.read_text().splitlines()[: args.questions]
    store = open_model(args.model)
    with FlashMoEModel(store, cache=bank_bytes(store, 1.0)) as model:
        texts = [answer(model, question, args.max_tokens) for question in questions]
    print(f"{len(texts)} questions, {sum(len(text.answer) for text in texts)} answer tokens")
    variants: list[tuple[str, dict[str, Any]]] = [("exact", {})]
    variants += [
        (f"experts per token {n}", {"experts_per_token": n}) for n in args.experts_per_token
    ]
    variants += [(f"route bias {b:g}", {"route_bias": b}) for b in args.route_bias]
    print("| bank | | KL mean | KL p99 | top-1 agreement | hit rate | read per token | tok/s |")
    print("|---|---|---|---|---|---|---|---|")
    for share in args.share:
        for name, options in variants:
            with FlashMoEModel(store, cache=bank_bytes(store, share), **options) as model:
                found = measure(model, texts)
            print(
                f"| {share:.0%} | {name} | {found['mean']:.4f} | {found['p99']:.2f} | "
                f"{found['agreement']:.1%} | {found['hit_rate']:.1%} | "
                f"{format_size(found['bytes_per_token'])} | {found['tokens_per_second']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
