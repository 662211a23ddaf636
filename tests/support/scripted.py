"""Stand-ins for the two things that a session is given: a model and a tokenizer."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

VOCABULARY = 128


class ScriptedModel(nn.Module):
    """After a prompt of one token, answers with the tokens of a script, whatever it is fed."""

    def __init__(self, script: Sequence[int], vocabulary: int) -> None:
        super().__init__()
        self._script = list(script)
        self._vocabulary = vocabulary
        self.calls = 0

    def make_cache(self) -> list[Any]:
        return []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        wanted = self._script[min(self.calls, len(self._script) - 1)]
        self.calls += 1
        row = (mx.arange(self._vocabulary) == wanted).astype(mx.float32)
        return mx.broadcast_to(row, (*tokens.shape, self._vocabulary))


class Words:
    """A tokenizer of the words t0, t1, ... and nothing else."""

    has_chat_template = False

    def __init__(self, eos_token_ids: Sequence[int] = ()) -> None:
        self.eos_token_ids = set(eos_token_ids)

    def __len__(self) -> int:
        return VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    @property
    def detokenizer(self) -> "WordStream":
        return WordStream()


class WordStream:
    """Says each word as it comes, and a full stop at the end."""

    def __init__(self) -> None:
        self.last_segment = ""

    def add_token(self, token: int) -> None:
        self.last_segment = f"t{token} "

    def finalize(self) -> None:
        self.last_segment = "."
