"""Prompts to measure with, built in or from a file."""

from __future__ import annotations

from pathlib import Path

from flashmoe.base.errors import PromptError

# What Benjamin Marie's article on running Mixtral-8x7B on consumer hardware measures
# mixtral-offloading with; each is a conversation of its own.
PROMPTS = (
    "Write the recipe for a chicken curry with coconut milk.",
    "Translate into French the following sentence: I love bread and cheese!",
    "Cite 20 famous people.",
    "Where is the moon right now?",
)

# What the demo model knows.
QUESTIONS = (
    "What is a barn?",
    "What is the capital of the United States?",
    "Define scent.",
    "What is a violin?",
    "What does it mean to walk?",
    "Define river.",
)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not blank.

    Raises PromptError when there are none or they are not UTF-8, and OSError.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise PromptError(f"{path} is not valid UTF-8") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise PromptError(f"{path} has no prompts; write one per line")
    return prompts
