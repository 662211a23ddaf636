"""WordNet -> facts -> short question-and-answer dialogs, the demo model's only data.

    python scripts/demo_model/facts.py

prints how many facts there are and a sample of dialogs. The order of the facts and of
every random draw is fixed: train.py and accuracy.py depend on both.
"""

import argparse
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from wordnet import (
    NOUN_ANIMAL,
    NOUN_FOOD,
    NOUN_LOCATION,
    WORDNET_DIR,
    Lemma,
    Synset,
    read_lemmas,
    read_synsets,
)

PARTS_OF_SPEECH = ("noun", "verb", "adj")
MAX_DEFINITION_CHARS = 110
MAX_RARE_NOUN_CHARS = 10
EXAMPLE_CHARS = range(13, 70)

SMALL_TALK_RATE = 0.004
DEFINITION_RATE = 0.72

CAPITAL_OF = re.compile(
    r"(?:the )?(?:national )?capital (?:and largest city )?of (?:the )?"
    r"([A-Z][A-Za-z ]+?)(?:[;,]| in | and | on | located|$)"
)

GREETING = "Hello! Ask me what a word means."
IDENTITY = "I am a tiny mixture-of-experts model that has read the WordNet dictionary."
ABILITIES = "I can define words, name their kind, give synonyms, and name capitals."
SMALL_TALK = (
    ("Hello", GREETING),
    ("Hi", GREETING),
    ("Hello!", GREETING),
    ("Hey", GREETING),
    ("Who are you?", IDENTITY),
    ("What are you?", IDENTITY),
    ("What can you do?", ABILITIES),
    ("Help", ABILITIES),
    ("Thanks", "You are welcome."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye", "Goodbye."),
    ("Bye", "Goodbye."),
    ("How are you?", "I am well. Ask me what a word means."),
)

Dialog = tuple[str, str]


@dataclass(frozen=True)
class Fact:
    """What the model is to know of one word, in the most frequent of its senses."""

    word: str
    kind: str
    """"noun", "verb", "adj", or "capital" for a city whose country is asked about."""
    definition: str
    hypernym: str | None = None
    synonym: str | None = None
    example: str | None = None
    country: str | None = None
    """Of a capital; None for every other kind."""


def read_facts(wordnet: Path = WORDNET_DIR) -> list[Fact]:
    """All facts: nouns, verbs, adjectives, each in the index's order; capitals among the nouns."""
    facts = []
    for part_of_speech in PARTS_OF_SPEECH:
        synsets = read_synsets(wordnet, part_of_speech)
        for lemma in read_lemmas(wordnet, part_of_speech):
            synset = synsets[lemma.synsets[0]]
            capital = _capital_fact(lemma, synset) if part_of_speech == "noun" else None
            if capital is not None:
                facts.append(capital)
            fact = _word_fact(lemma, synset, part_of_speech, synsets)
            if fact is not None:
                facts.append(fact)
    return facts


def _capital_fact(lemma: Lemma, synset: Synset) -> Fact | None:
    """The fact that this city is a capital, from a definition that begins by saying so."""
    city = synset.words[0]
    if synset.lexicographer_file != NOUN_LOCATION or city.lower() != lemma.text:
        return None
    match = CAPITAL_OF.match(synset.definition)
    if match is None:
        return None
    return Fact(city, "capital", synset.definition, country=match.group(1).strip())


def _word_fact(
    lemma: Lemma, synset: Synset, part_of_speech: str, synsets: dict[str, Synset]
) -> Fact | None:
    """The definition of a common word, or None for one to leave out."""
    text = lemma.text
    if text.startswith("capital of") or text.endswith(" capital"):
        return None  # "Japanese capital" and the like: names of a city, not words to define
    if not synset.definition or len(synset.definition) > MAX_DEFINITION_CHARS:
        return None
    if part_of_speech != "noun" and not re.fullmatch(r"[a-z][a-z' -]*", text):
        return None
    # The index is in lower case; the synset has the word as it is written.
    word = next((word for word in synset.words if word.lower() == text), text)
    if not re.fullmatch(r"[A-Za-z][A-Za-z' .-]*", word):
        return None
    if lemma.tagged_senses == 0 and not _is_short_animal_or_food(word, synset):
        return None

    hypernym = synsets.get(synset.hypernyms[0]) if synset.hypernyms else None
    synonyms = [other for other in synset.words if other != word]
    examples = [example for example in synset.examples if len(example) in EXAMPLE_CHARS]
    return Fact(
        word,
        part_of_speech,
        synset.definition,
        hypernym=hypernym.words[0] if hypernym else None,
        synonym=synonyms[0] if synonyms else None,
        example=examples[0] if examples else None,
    )


def _is_short_animal_or_food(word: str, synset: Synset) -> bool:
    """Rare nouns worth keeping: people ask a dictionary about animals and food."""
    return (
        synset.lexicographer_file in (NOUN_ANIMAL, NOUN_FOOD)
        and " " not in word
        and len(word) <= MAX_RARE_NOUN_CHARS
    )


def make_dialog(fact: Fact, rng: random.Random) -> Dialog:
    """One question about `fact` with its answer; at times small talk instead."""
    if rng.random() < SMALL_TALK_RATE:
        return rng.choice(SMALL_TALK)
    if fact.kind == "capital":
        return rng.choice(_capital_questions(fact.country)), f"{fact.word}."
    has_other = fact.hypernym or fact.synonym or fact.example
    if rng.random() < DEFINITION_RATE or not has_other:
        return rng.choice(_definition_questions(fact)), sentence(fact.definition)
    others = _other_dialogs(fact)
    if not others:  # a verb with nothing but a hypernym: verbs are not asked for their kind
        return make_dialog(replace(fact, hypernym=None), rng)
    return rng.choice(others)


def sentence(text: str) -> str:
    """`text` as the model answers it: a capital letter first, a full stop last."""
    return text[0].upper() + text[1:] + "."


def with_article(noun: str) -> str:
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def _is_common_noun(fact: Fact) -> bool:
    return fact.kind == "noun" and fact.word[0].islower()


def _capital_questions(country: str) -> list[str]:
    second = f"What's the capital of {country}?"
    if country.startswith(("United", "Neth", "Phil")):
        second = f"What is the capital of the {country}?"
    return [f"What is the capital of {country}?", second, f"Name the capital of {country}."]


def _definition_questions(fact: Fact) -> list[str]:
    word = fact.word
    if _is_common_noun(fact):
        return [
            f"What is {with_article(word)}?",
            f"What is {word}?",
            f"Define {word}.",
            f'What does "{word}" mean?',
        ]
    if fact.kind == "noun":
        return [f"What is {word}?", f"Who or what is {word}?", f"Tell me about {word}."]
    if fact.kind == "verb":
        return [
            f"What does it mean to {word}?",
            f"Define {word}, the verb.",
            f'What does "to {word}" mean?',
        ]
    return [
        f"What does {word} mean?",
        f"Define {word}, the adjective.",
        f'What is meant by "{word}"?',
    ]


def _other_dialogs(fact: Fact) -> list[Dialog]:
    """What can be asked besides the definition: the kind, a synonym, an example."""
    dialogs = []
    if fact.hypernym and fact.kind == "noun":
        noun = with_article(fact.word) if _is_common_noun(fact) else fact.word
        answer = sentence(with_article(fact.hypernym))
        dialogs.append((f"What kind of thing is {noun}?", answer))
    if fact.synonym:
        dialogs.append((f"Give a synonym of {fact.word}.", sentence(fact.synonym)))
    if fact.example:
        dialogs.append((f"Use {fact.word} in a sentence.", sentence(fact.example)))
    return dialogs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wordnet", type=Path, default=WORDNET_DIR)
    parser.add_argument("--samples", type=int, default=25, help="dialogs to print")
    args = parser.parse_args()
    facts = read_facts(args.wordnet)
    counts = Counter(fact.kind for fact in facts)
    print(f"{len(facts):,} facts:", ", ".join(f"{n:,} {kind}" for kind, n in counts.items()))
    rng = random.Random(1)
    for fact in rng.sample(facts, args.samples):
        question, answer = make_dialog(fact, rng)
        print(f"  {question}  {answer}")


if __name__ == "__main__":
    main()
