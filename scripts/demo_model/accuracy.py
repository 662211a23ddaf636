"""How many definitions a demo checkpoint recites exactly: a sharp test of quantization.

    python scripts/demo_model/accuracy.py flashmoe/demo

Asks "Define X." for random common nouns, decodes greedily with float32 activations, and
counts the answers that equal WordNet's definition to the letter. Takes any checkpoint
that mlx-lm loads: the bfloat16 one export.py writes or what bundle.py makes of it.

The nouns and their order are fixed (one seed), so figures for the same number of
questions compare. They are questions the model was trained on: this measures what the
weights remember, not what they could infer.
"""

import argparse
import json
import random
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from facts import WORDNET_DIR, read_facts, sentence
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper

SELECTION_SEED = 3
MAX_ANSWER_TOKENS = 60


def select_questions(count: int, wordnet: Path = WORDNET_DIR) -> list[tuple[str, str]]:
    """The first `count` nouns of one fixed shuffle, as (question, expected answer)."""
    nouns = [
        fact
        for fact in read_facts(wordnet)
        if fact.kind == "noun" and fact.word[0].islower() and " " not in fact.word
    ]
    random.Random(SELECTION_SEED).shuffle(nouns)
    return [(f"Define {fact.word}.", sentence(fact.definition)) for fact in nouns[:count]]


def answer(model: nn.Module, tokenizer: TokenizerWrapper, question: str) -> str:
    """The model's greedy answer to one question, up to its end token."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    tokens = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=MAX_ANSWER_TOKENS):
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(token)
    return tokenizer.decode(tokens).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="checkpoint directory, MLX or Hugging Face")
    parser.add_argument("--questions", type=int, default=150, help="how many; default: 150")
    parser.add_argument("--wordnet", type=Path, default=WORDNET_DIR)
    parser.add_argument("--misses", action="store_true", help="print the wrong answers")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead")
    args = parser.parse_args()

    model, tokenizer = load(str(args.model))
    weights_bytes = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    # Activations take the dtype of the scales and norms; packed weights stay as they are.
    model.set_dtype(mx.float32)
    questions = select_questions(args.questions, args.wordnet)
    start = time.perf_counter()
    exact = 0
    for question, expected in questions:
        given = answer(model, tokenizer, question)
        exact += given == expected
        if args.misses and given != expected:
            print(f"{question}\n  expected: {expected}\n  answered: {given}")
    seconds = time.perf_counter() - start

    if args.json:
        result = {
            "model": str(args.model),
            "weights_bytes": weights_bytes,
            "questions": len(questions),
            "exact": exact,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(result))
        return
    print(f"{'model':<24} {'MB':>6} {'exact':>9} {'seconds':>8}")
    exact_of = f"{exact}/{len(questions)}"
    print(f"{args.model.name:<24} {weights_bytes / 1e6:>6.1f} {exact_of:>9} {seconds:>8.0f}")


if __name__ == "__main__":
    main()
