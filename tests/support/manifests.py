"""Manifests as JSON documents, and edits that spoil them."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Key = str | int
Edit = Callable[[Any], None]


def load_document(folder: Path) -> Any:
    return json.loads((folder / "flashmoe.json").read_text())


def save_document(folder: Path, document: Any) -> None:
    (folder / "flashmoe.json").write_text(json.dumps(document))


def value_at(document: Any, path: Sequence[Key]) -> Any:
    for key in path:
        document = document[key]
    return document


def put(*path_and_value: Any) -> Edit:
    """Sets the value at a path."""
    *path, last, value = path_and_value

    def edit(document: Any) -> None:
        value_at(document, path)[last] = value

    return edit


def add(*path_and_value: Any) -> Edit:
    """Appends to the array at a path."""
    *path, value = path_and_value

    def edit(document: Any) -> None:
        value_at(document, path).append(copy.deepcopy(value))

    return edit


def repeat(*path: Key) -> Edit:
    """Appends the first element of the array at a path to it."""

    def edit(document: Any) -> None:
        array = value_at(document, path)
        array.append(copy.deepcopy(array[0]))

    return edit


def walk(document: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """Every path of a document with its value, the root included."""
    yield path, document
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in items:
            yield from walk(value, (*path, key))
