"""What bits, groups, methods and recipes cost the demo model: size, exact answers, divergence.

    python scripts/demo_model/quantization.py runs/demo-hf

Repacks the bfloat16 checkpoint that export.py wrote once for each row, experts as the row says and
the rest at 8 bits, and feeds the questions of accuracy.py with their answers. An answer counts as
exact when each of its tokens, the end included, is the likeliest one after those before it: then
greedy decoding gives it to the letter. Divergence is KL(bfloat16 || row) over the answers' tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from accuracy import select_questions
from facts import WORDNET_DIR

from flashmoe import FlashMoEModel, repack
from flashmoe.bench.divergence import Tally
from flashmoe.repacking.recipe import Recipe, from_tables

BATCH = 25
Sequences = list[tuple[list[int], list[int]]]  # prompt and answer


@dataclass(frozen=True)
class Row:
    """One way of packing; `bits_per_weight` are those of the experts, scales included."""

    name: str
    store_bytes: int
    bits_per_weight: float
    exact: int
    exact_of_first: int
    questions: int
    kl_mean: float
    kl_p99: float
    agreement: float
    repack_seconds: float


def recipes() -> Iterator[Recipe]:
    for bits, group in ((8, 64), (5, 64), (4, 64), (4, 32), (3, 64), (3, 32), (2, 64), (2, 32)):
        for method in ("rtn", "hqq"):
            tables = {"bits": 8, "experts": {"bits": bits, "group": group, "method": method}}
            yield from_tables(f"experts {bits}-bit/{group} {method}, rest 8-bit", tables)
    for method in ("rtn", "hqq"):
        down = {"bits": 3, "method": method, "down": {"bits": 4}}
        yield from_tables(f"3-bit recipe {method}", {"bits": 8, "experts": down})
        two = {"bits": 4, "method": method, "experts": {"bits": 2, "group": 32}}
        yield from_tables(f"2-bit recipe {method}", two)
        yield from_tables(f"everything 4-bit/64 {method}", {"bits": 4, "method": method})
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        yield from_tables(f"experts {mode}, rest 8-bit", {"bits": 8, "experts": {"mode": mode}})


def encode(tokenizer: Any, questions: Sequence[tuple[str, str]]) -> Sequences:
    """Token ids of each question and of its answer with the end."""
    found = []
    for question, answer in questions:
        messages = [{"role": "user", "content": question}]
        prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        (end,) = tokenizer.eos_token_ids
        found.append((prompt, [*tokenizer.encode(answer, add_special_tokens=False), end]))
    return found


def answer_logits(model: FlashMoEModel, sequences: Sequences) -> Iterator[tuple[list[int], Any]]:
    """In batches of similar lengths: which sequences, and their logits before each token of the
    answers, float32 [tokens, vocabulary]."""
    order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        width = max(sum(map(len, sequences[i])) for i in chosen)
        # What is fed behind an answer changes nothing before it.
        fed = np.zeros((len(chosen), width), np.int32)
        rows, columns = [], []
        for row, i in enumerate(chosen):
            prompt, answer = sequences[i]
            fed[row, : len(prompt) + len(answer)] = prompt + answer
            rows += [row] * len(answer)
            columns += range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logits = model.model(mx.array(fed))[mx.array(rows), mx.array(columns)]
        yield chosen, np.array(logits.astype(mx.float32))


def run(
    checkpoint: Path,
    recipe: Recipe | str,
    questions: Sequence[tuple[str, str]],
    references: list[Any],
) -> Row:
    """Measure one recipe; the first fills `references` with its logits."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        store = repack(checkpoint, Path(folder) / "row.flashmoe", recipe=recipe)
        seconds = time.perf_counter() - started
        with FlashMoEModel(store, memory="4GB", dtype="float32") as model:
            sequences = encode(model.tokenizer, questions)
            exact: list[int] = []
            tally = Tally()
            first = not references
            for number, (chosen, logits) in enumerate(answer_logits(model, sequences)):
                if first:
                    references.append(logits)
                targets = np.concatenate([sequences[i][1] for i in chosen])
                tally.add(references[number], logits, targets)
                right = logits.argmax(axis=1) == targets
                ends = np.cumsum([len(sequences[i][1]) for i in chosen])
                parts = np.split(right, ends[:-1])
                exact += [i for i, part in zip(chosen, parts, strict=True) if part.all()]
    manifest = store.manifest
    layouts = [layer.layout for layer in manifest.layers]
    expert_bytes = sum(layout.n_experts * layout.record.payload_bytes for layout in layouts)
    config = json.loads((checkpoint / "config.json").read_text())
    width = 3 * config["hidden_size"] * config["moe_intermediate_size"]
    weights = sum(layout.n_experts for layout in layouts) * width
    found = tally.result()
    return Row(
        name=recipe if isinstance(recipe, str) else recipe.name,
        store_bytes=expert_bytes + manifest.resident_bytes,
        bits_per_weight=8 * expert_bytes / weights,
        exact=len(exact),
        exact_of_first=sum(i < 150 for i in exact),
        questions=len(questions),
        kl_mean=found.kl_mean,
        kl_p99=found.kl_p99,
        agreement=found.agreement,
        repack_seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="what export.py wrote")
    parser.add_argument("--questions", type=int, default=500, help="how many; default: 500")
    parser.add_argument("--wordnet", type=Path, default=WORDNET_DIR)
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose name has this")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead")
    args = parser.parse_args()

    questions = select_questions(args.questions, args.wordnet)
    if not args.json:
        print("| weights | MB | bits | exact | of the first 150 | KL | 99 % | top-1 | repack |")
        print("|---|---|---|---|---|---|---|---|---|")
    references: list[Any] = []
    for recipe in ("as-is", *(r for r in recipes() if args.only in r.name)):
        row = run(args.checkpoint, recipe, questions, references)
        if args.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        print(
            f"| {row.name} | {row.store_bytes / 1e6:.1f} | {row.bits_per_weight:.2f} "
            f"| {row.exact} | {row.exact_of_first} | {row.kl_mean:.4f} | {row.kl_p99:.3f} "
            f"| {row.agreement:.2%} | {row.repack_seconds:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
