"""Standing in for the tokenizer that a checkpoint does not have."""

from __future__ import annotations

from typing import Any

from flashmoe.errors import PromptError


class MissingTokenizer:
    """Lets token ids through and explains itself when it is asked for anything about text."""

    has_chat_template = False

    def __init__(self, vocabulary: int, eos_token_ids: int | list[int] | None) -> None:
        self._vocabulary = vocabulary
        ids = [eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids
        self.eos_token_ids = set(ids or [])

    def __len__(self) -> int:
        return self._vocabulary

    def encode(self, text: str) -> list[int]:
        raise PromptError("this model has no tokenizer; give token ids instead of text")

    def decode(self, ids: Any) -> str:
        raise PromptError("this model has no tokenizer; its token ids have no text")

    @property
    def detokenizer(self) -> _Silent:
        return _Silent()


class _Silent:
    """mlx-lm's streaming detokenizer interface, printing nothing."""

    last_segment = ""

    def add_token(self, token: int) -> None:
        """Nothing becomes printable."""

    def finalize(self) -> None:
        """Nothing was held back."""
