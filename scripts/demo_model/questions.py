"""Questions for the demo model, one per line, in two files that share no fact.

    python scripts/demo_model/questions.py tune.txt report.txt

Asked as in training (definitions above all, then kinds, synonyms, examples, capitals), in a
fixed random order: for tuning on one file and reporting on the other.
"""

import argparse
import random
from pathlib import Path

from facts import WORDNET_DIR, make_dialog, read_facts

SEED = 7


def draw_questions(count: int, wordnet: Path = WORDNET_DIR) -> list[str]:
    """One question about each of `count` facts."""
    rng = random.Random(SEED)
    return [make_dialog(fact, rng)[0] for fact in rng.sample(read_facts(wordnet), count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs=2, help="where the halves go")
    parser.add_argument("--questions", type=int, default=200, help="per file; default: 200")
    parser.add_argument("--wordnet", type=Path, default=WORDNET_DIR)
    args = parser.parse_args()

    questions = draw_questions(2 * args.questions, args.wordnet)
    for number, path in enumerate(args.files):
        path.write_text("".join(f"{question}\n" for question in questions[number::2]))


if __name__ == "__main__":
    main()
