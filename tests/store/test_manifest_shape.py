"""Manifests of a wrong shape: wherever a value's type is wrong, a field missing or unknown."""

import copy

import pytest

from flashmoe.base.errors import StoreError
from flashmoe.store.parse import from_document
from tests.support.manifests import load_document, put, value_at, walk
from tests.support.stores import refuse_to_open

HUGE = 2**70
WRONG = {
    int: [None, True, False, "3", -1, 1.5, 3.0, HUGE, -HUGE, [], {}, float("nan")],
    str: [None, True, 3, 1.5, "", [], {}, [["x"]]],
    dict: [None, True, 3, 1.5, "x", [], [{}]],
    list: [None, True, 3, 1.5, "x", {}, {"0": {}}],
}
# Keys of these objects are names, not fields.
TABLES = {"files", "copied", "quantization", "projections"}


@pytest.fixture(scope="module")
def document(good_store):
    return load_document(good_store.path)


def objects(document):
    """Every path of a document whose value is an object with fields."""
    for path, value in walk(document):
        if isinstance(value, dict) and not (path and path[-1] in TABLES):
            yield path


def test_every_value_of_a_wrong_type(document):
    count = 0
    for path, value in walk(document):
        for wrong in WRONG[type(value)]:
            if path == ("source", "revision") and wrong is None:
                continue
            spoilt = copy.deepcopy(document)
            if path:
                put(*path, wrong)(spoilt)
            else:
                spoilt = wrong
            with pytest.raises(StoreError) as caught:
                from_document(spoilt, "manifest")
            named = [key for key in path if isinstance(key, str)]
            assert (named[-1] if named else "manifest") in str(caught.value)
            count += 1
    assert count > 700


def test_every_missing_field(document):
    count = 0
    for path in objects(document):
        for name in value_at(document, path):
            spoilt = copy.deepcopy(document)
            del value_at(spoilt, path)[name]
            with pytest.raises(StoreError, match=f"lacks the field '{name}'"):
                from_document(spoilt, "manifest")
            count += 1
    assert count == 75


@pytest.mark.parametrize("value", [None, 1, {}])
def test_an_unknown_field_at_every_level(document, value):
    count = 0
    for path in objects(document):
        spoilt = copy.deepcopy(document)
        put(*path, "surprise", value)(spoilt)
        with pytest.raises(StoreError, match="unknown field 'surprise'") as caught:
            from_document(spoilt, "manifest")
        for key in path:
            assert str(key) in str(caught.value)
        count += 1
    assert count == 16


def test_a_newer_version_is_named_before_its_fields(document):
    newer = copy.deepcopy(document) | {"version": 7, "surprise": 1}
    del newer["layers"]
    with pytest.raises(StoreError, match="store version 7"):
        from_document(newer, "manifest")


@pytest.mark.parametrize(
    ("found", "twice", "name"),
    [
        ('"parameters": 12345', '"parameters": 1, "parameters": 12345', "parameters"),
        ('"top_k": 2', '"top_k": 1, "top_k": 2', "top_k"),
        ('"config.json": "', '"config.json": "", "config.json": "', "config.json"),
    ],
    ids=["field", "inner field", "file"],
)
def test_a_key_stated_twice(store_folder, found, twice, name):
    path = store_folder / "flashmoe.json"
    text = path.read_text()
    assert found in text
    path.write_text(text.replace(found, twice, 1))
    refuse_to_open(store_folder, "flashmoe.json", name)
