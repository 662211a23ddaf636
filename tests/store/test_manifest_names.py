"""Names of files in a manifest: none may leave the store, or be one that no system takes."""

import pytest

from flashmoe.base.errors import StoreError
from flashmoe.store.reader import open_store
from tests.support.manifests import load_document, put, save_document
from tests.support.stores import frugal, refuse_to_open

NAMES = {
    "parent": "../x",
    "absolute": "/etc/passwd",
    "double slash": "//etc/passwd",
    "inner parent": "a/../../b",
    "harmless parent": "experts/../config.json",
    "backslash": "a\\b",
    "NUL": "a\0b",
    "manifest": "flashmoe.json",
    "dot": ".",
    "dot slash": "./config.json",
    "trailing slash": "config.json/",
    "empty part": "experts//layer-000.safetensors",
}
FIELDS = ["resident", "layers", "copied"]


def rename_file(folder, field, name):
    """Gives a file of a store another name in its manifest."""
    document = load_document(folder)
    edit = put("copied", name, "0" * 64) if field == "copied" else put(field, 0, "file", name)
    edit(document)
    save_document(folder, document)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_plain_path(store_folder, name, field):
    rename_file(store_folder, field, NAMES[name])
    refuse_to_open(
        store_folder, "flashmoe.json", repr(NAMES[name]), "not a plain path inside the store"
    )


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "name",
    ["", "x" * 300, "a/" * 3000 + "a", "\ud800"],
    ids=["empty", "long", "long path", "surrogate"],
)
def test_a_name_that_no_system_takes(store_folder, name, field):
    rename_file(store_folder, field, name)
    with frugal(), pytest.raises(StoreError):
        open_store(store_folder)
