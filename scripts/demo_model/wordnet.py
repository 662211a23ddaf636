"""Read WordNet 3.0's data and index files; the formats are those of wndb(5WN).

Knows nothing of questions and answers: facts.py picks what is worth learning.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORDNET_DIR = Path("/usr/share/wordnet")  # where Debian's wordnet-base puts the files

# Lexicographer file numbers, lexnames(5WN).
NOUN_ANIMAL = 5
NOUN_FOOD = 13
NOUN_LOCATION = 15

HYPERNYM_POINTERS = ("@", "@i")  # "is a kind of", "is an instance of"


@dataclass(frozen=True)
class Synset:
    """One meaning: the words that share it, its definition, examples and kinds."""

    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]
    """Keys of the synsets this one is a kind of, in the same data file."""
    lexicographer_file: int


@dataclass(frozen=True)
class Lemma:
    """One line of an index file: a word and its synsets, the most frequent first."""

    text: str
    tagged_senses: int
    """How many of its senses occur in WordNet's sense-tagged texts; 0 means rare."""
    synsets: tuple[str, ...]


def read_synsets(wordnet: Path, part_of_speech: str) -> dict[str, Synset]:
    """`data.<part_of_speech>` as synsets by offset (the eight digits, as a string)."""
    synsets = {}
    for line in _records(wordnet / f"data.{part_of_speech}"):
        head, _, gloss = line.partition(" | ")
        offset, synset = _parse_synset(head.split(), gloss.strip())
        synsets[offset] = synset
    return synsets


def read_lemmas(wordnet: Path, part_of_speech: str) -> Iterator[Lemma]:
    """`index.<part_of_speech>` in file order, which is alphabetical."""
    for line in _records(wordnet / f"index.{part_of_speech}"):
        # lemma pos synset_cnt p_cnt [ptr_symbol...] sense_cnt tagsense_cnt offset...
        fields = line.split()
        pointer_count = int(fields[3])
        yield Lemma(
            text=fields[0].replace("_", " "),
            tagged_senses=int(fields[5 + pointer_count]),
            synsets=tuple(fields[6 + pointer_count :]),
        )


def _records(path: Path) -> Iterator[str]:
    """The lines of a WordNet file without the licence, whose lines begin with a space."""
    with path.open(encoding="latin1") as lines:
        for line in lines:
            if not line.startswith(" "):
                yield line


def _parse_synset(fields: list[str], gloss: str) -> tuple[str, Synset]:
    # offset lex_filenum ss_type w_cnt(hex) [word lex_id]... p_cnt [ptr offset pos src/tgt]...
    word_count = int(fields[3], 16)
    pointer_at = 4 + 2 * word_count
    pointer_count = int(fields[pointer_at])
    words = fields[4:pointer_at:2]
    symbols = fields[pointer_at + 1 : pointer_at + 1 + 4 * pointer_count : 4]
    targets = fields[pointer_at + 2 : pointer_at + 1 + 4 * pointer_count : 4]
    return fields[0], Synset(
        # Adjectives carry a syntactic marker, as in "galore(ip)".
        words=tuple(re.sub(r"\(.*\)", "", word).replace("_", " ") for word in words),
        definition=re.sub(r';?\s*"[^"]*".*$', "", gloss).strip(" ;"),
        examples=tuple(re.findall(r'"([^"]+)"', gloss)),
        hypernyms=tuple(
            target
            for symbol, target in zip(symbols, targets, strict=True)
            if symbol in HYPERNYM_POINTERS
        ),
        lexicographer_file=int(fields[1]),
    )
