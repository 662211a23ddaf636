"""Manifest files that are no manifest at all: wrong JSON, no JSON, or far too much of it."""

import pytest

from tests.support.stores import refuse_to_open

RAW = {
    "empty": (b"", "cannot be read as JSON"),
    "cut": (b'{"format": "flashmoe", "vers', "cannot be read as JSON"),
    "binary": (bytes(range(256)), "cannot be read as JSON"),
    "UTF-8 cut": (b'{"format": "\xe2\x82"}', "cannot be read as JSON"),
    "list": (b"[]", "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
    "number": (b"1", "must be a JSON object"),
    "string": (b'"flashmoe"', "must be a JSON object"),
    "empty object": (b"{}", "lacks the field 'format'"),
    "deep list": (b"[" * 100_000 + b"]" * 100_000, "cannot be read as JSON"),
    "deep object": (b'{"a":' * 100_000, "cannot be read as JSON"),
    "number of 5,000 digits": (b'{"format": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_manifest(store_folder, name):
    content, fragment = RAW[name]
    (store_folder / "flashmoe.json").write_bytes(content)
    refuse_to_open(store_folder, "flashmoe.json", fragment)


def test_sparse_manifest_of_100_mb(store_folder):
    with (store_folder / "flashmoe.json").open("wb") as file:
        file.truncate(100 * 10**6)
    refuse_to_open(store_folder, "flashmoe.json is larger than any manifest")
