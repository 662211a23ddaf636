"""From text or chat messages to token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from flashmoe.base.errors import PromptError

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


def to_messages(prompt: str, system: str | None) -> list[Message]:
    """A question as chat messages."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def encode_prompt(
    tokenizer: Any, prompt: Prompt, *, system: str | None = None, template: bool = True
) -> list[int]:
    """Token ids of a prompt.

    Text becomes a user message when the tokenizer has a chat template and `template` is true,
    else it is encoded as it is; messages always go through the template; ids are kept.
    Raises PromptError for an empty prompt, or messages that there is no template for.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        _check_encodable(prompt)
        if template and tokenizer.has_chat_template:
            ids = _render(tokenizer, to_messages(prompt, system))
        elif system:
            raise PromptError("a system prompt needs a chat template, which is not in use here")
        else:
            ids = list(tokenizer.encode(prompt))
    elif system:
        raise PromptError("a system prompt goes with text; put it into the messages instead")
    else:
        ids = _from_items(tokenizer, prompt)
    if not ids:
        raise PromptError("the prompt is empty")
    size = len(tokenizer)
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise PromptError(f"token id {wrong} is outside the vocabulary of {size}")
    return ids


def _from_items(tokenizer: Any, prompt: Any) -> list[int]:
    """Ids of chat messages, or of anything that holds whole numbers (a list, an array)."""
    try:
        items = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        if items and all(isinstance(item, Mapping) for item in items):
            return _render(tokenizer, items)
        return [operator.index(item) for item in items]
    except TypeError:
        raise PromptError(
            "a prompt is a text, a list of token ids or a list of chat messages"
        ) from None


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError("the prompt is not valid UTF-8") from None


def _render(tokenizer: Any, messages: list[Any]) -> list[int]:
    if not tokenizer.has_chat_template:
        raise PromptError(
            "this model has no chat template; give plain text without one (--no-template)"
        )
    if not all("role" in message and "content" in message for message in messages):
        raise PromptError("every chat message needs a role and a content")
    for message in messages:
        if isinstance(message["content"], str):
            _check_encodable(message["content"])
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    except Exception as error:  # templates raise what their authors chose
        raise PromptError(f"the chat template rejects these messages: {error}") from error
