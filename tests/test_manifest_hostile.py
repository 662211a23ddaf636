"""Stores that are wrong on purpose: each is refused by name, quickly and in little memory."""

import copy
import json
import os
import shutil

import pytest
from stores import RESIDENT_FILE, frugal, tiny_store

from flashmoe.errors import StoreError
from flashmoe.store.manifest import to_json
from flashmoe.store.parse import from_document
from flashmoe.store.reader import open_store

LAYER_FILE = "experts/layer-000.safetensors"
HUGE = 2**70


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("good") / "tiny.flashmoe")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good.path, tmp_path / "tiny.flashmoe")


@pytest.fixture(scope="module")
def text(good):
    return to_json(good.manifest)


def refuse(folder, *fragments):
    """`open_store` raises a StoreError of moderate length with every fragment in it."""
    with frugal(), pytest.raises(StoreError) as caught:
        open_store(folder)
    message = str(caught.value)
    assert len(message) < 1000
    for fragment in fragments:
        assert fragment in message


def parent(document, path):
    *keys, last = path
    for key in keys:
        document = document[key]
    return document, last


def put(*path_and_value):
    *path, value = path_and_value

    def mutate(document):
        node, last = parent(document, path)
        node[last] = value

    return mutate


def add(*path_and_value):
    """Append to the array at a path."""
    *path, value = path_and_value

    def mutate(document):
        node, last = parent(document, path)
        node[last].append(copy.deepcopy(value))

    return mutate


def repeat(*path):
    def mutate(document):
        node, last = parent(document, path)
        node[last].append(copy.deepcopy(node[last][0]))

    return mutate


LAYER = ("layers", 0)
PART = (*LAYER, "components", 1)
SHARD = ("resident", 0)
SHA = "0" * 64

MUTATIONS = {
    "other format": (put("format", "zip"), "is not a flashmoe manifest"),
    "version 0": (put("version", 0), "store version 0"),
    "version 2": (put("version", 2), "store version 2 but this flashmoe reads version 1"),
    "version 2^62": (put("version", 2**62), "store version 4611686018427387904"),
    "version 1.0": (put("version", 1.0), "version must be a whole number"),
    "version NaN": (put("version", float("nan")), "version must be a whole number"),
    "parameters": (put("parameters", float("inf")), "parameters must be a whole number"),
    "no layers": (put("layers", []), "layers"),
    "no components": (put(*LAYER, "components", []), "has no components"),
    "zero experts": (put(*LAYER, "n_experts", 0), "n_experts must be from 1"),
    "2^41 experts": (put(*LAYER, "n_experts", 2**41), "n_experts must be from 1 to 2^40"),
    "2^40 experts": (put(*LAYER, "n_experts", 2**40), "crc32 has 96 digits, not 8 for each of"),
    "one expert less": (put(*LAYER, "n_experts", 3), "crc32 has 96 digits"),
    "zero top_k": (put(*LAYER, "top_k", 0), "top_k must be from 1"),
    "top_k 5 of 4": (put(*LAYER, "top_k", 5), "top_k 5 exceeds 4 experts"),
    "kind": (put(*LAYER, "kind", "SwitchXYZ"), "kind 'SwitchXYZ' is unknown"),
    "no stride": (put(*LAYER, "stride", 0), "stride must be from 1"),
    "stride 4096": (put(*LAYER, "stride", 4096), "stride 4096 is not a multiple of 16384"),
    "stride 16385": (put(*LAYER, "stride", 16_385), "stride 16385 is not a multiple of 16384"),
    "wide stride": (put(*LAYER, "stride", 32_768), "layer-000.safetensors has 81920 bytes"),
    "2^40 stride": (put(*LAYER, "stride", 2**40), "layer-000.safetensors has 81920 bytes"),
    "offset 1": (put(*PART, "offset", 1), "gate_proj.scales does not start on 4 KiB"),
    "offset 4095": (put(*PART, "offset", 4095), "gate_proj.scales does not start on 4 KiB"),
    "overlap": (put(*PART, "offset", 0), "gate_proj.scales overlaps the component before it"),
    "out of order": (put(*PART, "offset", 12_288), "down_proj.weight overlaps"),
    "beyond stride": (
        put(*LAYER, "components", 2, "offset", 16_384),
        "components end at 16524, beyond the stride 16384",
    ),
    "far offset": (put(*LAYER, "components", 2, "offset", 2**62), "beyond the stride"),
    "long component": (put(*LAYER, "components", 2, "shape", [8193]), "components end at 24578"),
    "component dtype": (put(*PART, "dtype", "F8"), "dtype 'F8' is unknown"),
    "tensor dtype": (put(*SHARD, "tensors", 0, "dtype", "bf16"), "dtype 'bf16' is unknown"),
    "shape 2^60": (put(*PART, "shape", [2**60]), "components[1]: shape"),
    "shape 2^40 twice": (put(*PART, "shape", [2**40, 2**40]), "too large for any tensor"),
    "shape 0 by 2^60": (put(*PART, "shape", [0, 2**60]), "too large for any tensor"),
    "tensor shape 2^50": (put(*SHARD, "tensors", 0, "shape", [2**25, 2**25]), RESIDENT_FILE),
    "tensor one longer": (put(*SHARD, "tensors", 1, "shape", [8]), "16472 bytes"),
    "shape of 20,000": (put(*PART, "shape", [2**40] * 20_000), "components[1]: shape"),
    "tensor of 20,000": (put(*SHARD, "tensors", 0, "shape", [1] * 20_000), "tensors[0]: shape"),
    "mode": (put("quantization", "embed", "mode", "int8"), "mode 'int8' is unknown"),
    "layer mode": (put(*LAYER, "projections", "gate_proj", "mode", ""), "non-empty string"),
    "zero bits": (put("quantization", "embed", "bits", 0), "bits must be from 1"),
    "1000 bits": (put("quantization", "embed", "bits", 1000), "bits"),
    "layer bits": (put(*LAYER, "projections", "gate_proj", "bits", 1000), "bits"),
    "group size": (put("quantization", "embed", "group_size", 2**40), "group_size"),
    "sha short": (put(*LAYER, "sha256", "0" * 63), "sha256 must be a SHA-256 in hex"),
    "sha long": (put(*SHARD, "sha256", "0" * 65), "sha256 must be a SHA-256 in hex"),
    "sha upper": (put(*LAYER, "sha256", "A" * 64), "sha256 must be a SHA-256 in hex"),
    "sha newline": (put(*LAYER, "sha256", "a" * 64 + "\n"), "sha256 must be a SHA-256 in hex"),
    "copied sha": (put("copied", "config.json", "0" * 40), "config.json must be a SHA-256"),
    "source sha": (put("source", "files", "x", "g" * 64), "files: x must be a SHA-256"),
    "crc short": (put(*LAYER, "crc32", "0" * 95), "crc32 has 95 digits"),
    "crc long": (put(*SHARD, "crc32", "0" * 24), "crc32 has 24 digits, not 8 for each of 2"),
    "crc upper": (put(*SHARD, "crc32", "A" * 16), "crc32 must be hex digits"),
    "crc empty": (put(*SHARD, "crc32", ""), "crc32 has 0 digits"),
    "component twice": (put(*PART, "name", "gate_proj.weight"), "repeat 'gate_proj.weight'"),
    "tensor twice": (
        put(*SHARD, "tensors", 1, "name", "embed.weight"),
        "tensor names repeat 'embed.weight'",
    ),
    "tensor __metadata__": (put(*SHARD, "tensors", 1, "name", "__metadata__"), "__metadata__"),
    "layer twice": (repeat("layers"), "file names repeat 'experts/layer-000.safetensors'"),
    "shard twice": (repeat("resident"), f"file names repeat '{RESIDENT_FILE}'"),
    "path twice": (
        put("layers", 1, "path", "model.layers.0.mlp.switch_mlp"),
        "layer paths repeat 'model.layers.0.mlp.switch_mlp'",
    ),
    "file twice": (put(*SHARD, "file", LAYER_FILE), f"file names repeat '{LAYER_FILE}'"),
    "copied is a layer": (put("copied", LAYER_FILE, SHA), "file names repeat"),
    "no config.json": (put("copied", {}), "copied files lack config.json"),
    "more copied": (put("copied", "tokenizer.json", SHA), "tokenizer.json is missing"),
    "copied folder": (put("copied", "experts", SHA), "experts"),
    "more layers": (add("layers", {}), "layers[2]"),
    "deep": (put("source", "files", {"a": {"b": {"c": {}}}}), "files: a must be a SHA-256"),
}

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


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(folder, text, name):
    mutate, fragment = MUTATIONS[name]
    document = json.loads(text)
    mutate(document)
    (folder / "flashmoe.json").write_text(json.dumps(document))
    refuse(folder, fragment)


@pytest.mark.parametrize("field", ["resident", "layers", "copied"])
@pytest.mark.parametrize("name", NAMES)
def test_file_name(folder, text, name, field):
    document = json.loads(text)
    if field == "copied":
        document["copied"][NAMES[name]] = SHA
    else:
        document[field][0]["file"] = NAMES[name]
    (folder / "flashmoe.json").write_text(json.dumps(document))
    refuse(folder, "flashmoe.json", repr(NAMES[name]), "not a plain path inside the store")


@pytest.mark.parametrize("field", ["resident", "layers", "copied"])
@pytest.mark.parametrize(
    "name",
    ["", "x" * 300, "a/" * 3000 + "a", "\ud800"],
    ids=["empty", "long", "long path", "surrogate"],
)
def test_file_name_that_no_system_takes(folder, text, name, field):
    document = json.loads(text)
    if field == "copied":
        document["copied"][name] = SHA
    else:
        document[field][0]["file"] = name
    (folder / "flashmoe.json").write_text(json.dumps(document))
    with frugal(), pytest.raises(StoreError):
        open_store(folder)


def containers(document, path=()):
    """Every path of a document with its value, the root included."""
    yield path, document
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from containers(value, (*path, key))
        else:
            yield (*path, key), value


WRONG = {
    int: [None, True, False, "3", -1, 1.5, 3.0, HUGE, -HUGE, [], {}, float("nan")],
    str: [None, True, 3, 1.5, "", [], {}, [["x"]]],
    dict: [None, True, 3, 1.5, "x", [], [{}]],
    list: [None, True, 3, 1.5, "x", {}, {"0": {}}],
}
# Keys of these objects are names, not fields.
TABLES = {"files", "copied", "quantization", "projections"}


def test_every_value_of_a_wrong_type(text):
    count = 0
    for path, value in containers(json.loads(text)):
        for wrong in WRONG[type(value)]:
            if path == ("source", "revision") and wrong is None:
                continue
            document = json.loads(text)
            if path:
                put(*path, wrong)(document)
            else:
                document = wrong
            with pytest.raises(StoreError) as caught:
                from_document(document, "manifest")
            named = [key for key in path if isinstance(key, str)]
            assert (named[-1] if named else "manifest") in str(caught.value)
            count += 1
    assert count > 700


def test_every_missing_field(text):
    count = 0
    for path, value in containers(json.loads(text)):
        if not isinstance(value, dict) or (path and path[-1] in TABLES):
            continue
        for name in value:
            document = json.loads(text)
            node = document
            for key in path:
                node = node[key]
            del node[name]
            with pytest.raises(StoreError, match=f"lacks the field '{name}'"):
                from_document(document, "manifest")
            count += 1
    assert count == 75


@pytest.mark.parametrize("value", [None, 1, {}])
def test_an_unknown_field_at_every_level(text, value):
    count = 0
    for path, node in containers(json.loads(text)):
        if not isinstance(node, dict) or (path and path[-1] in TABLES):
            continue
        document = json.loads(text)
        put(*path, "surprise", value)(document)
        with pytest.raises(StoreError, match="unknown field 'surprise'") as caught:
            from_document(document, "manifest")
        for key in path:
            assert str(key) in str(caught.value)
        count += 1
    assert count == 16


def test_a_newer_version_is_named_before_its_fields(text):
    document = json.loads(text) | {"version": 7, "surprise": 1}
    del document["layers"]
    with pytest.raises(StoreError, match="store version 7"):
        from_document(document, "manifest")


@pytest.mark.parametrize(
    ("found", "twice", "name"),
    [
        ('"parameters": 12345', '"parameters": 1, "parameters": 12345', "parameters"),
        ('"top_k": 2', '"top_k": 1, "top_k": 2', "top_k"),
        ('"config.json": "', f'"config.json": "{SHA}", "config.json": "', "config.json"),
    ],
    ids=["field", "inner field", "file"],
)
def test_a_key_stated_twice(folder, text, found, twice, name):
    (folder / "flashmoe.json").write_text(text.replace(found, twice, 1))
    refuse(folder, "flashmoe.json", name)


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
def test_raw_manifest(folder, name):
    content, fragment = RAW[name]
    (folder / "flashmoe.json").write_bytes(content)
    refuse(folder, "flashmoe.json", fragment)


def test_sparse_manifest_of_100_mb(folder):
    with (folder / "flashmoe.json").open("wb") as file:
        file.truncate(100 * 10**6)
    refuse(folder, "flashmoe.json is larger than any manifest")


def test_manifest_is_a_folder(folder):
    (folder / "flashmoe.json").unlink()
    (folder / "flashmoe.json").mkdir()
    refuse(folder, "flashmoe.json")


def test_manifest_is_a_symlink_loop(folder):
    (folder / "flashmoe.json").unlink()
    (folder / "flashmoe.json").symlink_to("flashmoe.json")
    refuse(folder, "flashmoe.json")


def test_manifest_is_a_pipe(folder):
    (folder / "flashmoe.json").unlink()
    os.mkfifo(folder / "flashmoe.json")
    refuse(folder, "flashmoe.json")


def test_manifest_is_missing(folder):
    (folder / "flashmoe.json").unlink()
    refuse(folder, "is not a complete flashmoe store", "flashmoe repack")


def test_folder_is_missing(tmp_path):
    refuse(tmp_path / "none", "none is not a complete flashmoe store")


def test_folder_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    refuse(tmp_path / "file", str(tmp_path / "file"))


def test_config_is_missing(folder):
    (folder / "config.json").unlink()
    refuse(folder, "config.json is missing; repack the model")


@pytest.mark.parametrize("name", ["config.json", RESIDENT_FILE, LAYER_FILE])
class TestFile:
    """The same damage to each kind of file."""

    def test_missing(self, folder, name):
        (folder / name).unlink()
        refuse(folder, name)

    def test_folder(self, folder, name):
        (folder / name).unlink()
        (folder / name).mkdir()
        refuse(folder, name)

    def test_symlink_loop(self, folder, name):
        (folder / name).unlink()
        (folder / name).symlink_to((folder / name).name)
        refuse(folder, name)

    def test_pipe(self, folder, name):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refuse(folder, name)


@pytest.mark.parametrize(("name", "size_bytes"), [(RESIDENT_FILE, 16_472), (LAYER_FILE, 81_920)])
class TestSafetensors:
    def test_truncated_by_a_byte(self, folder, name, size_bytes):
        os.truncate(folder / name, size_bytes - 1)
        refuse(folder, f"{name} has {size_bytes - 1} bytes", f"implies {size_bytes}")

    def test_extended_by_a_byte(self, folder, name, size_bytes):
        os.truncate(folder / name, size_bytes + 1)
        refuse(folder, f"{name} has {size_bytes + 1} bytes", f"implies {size_bytes}")

    def test_empty(self, folder, name, size_bytes):
        os.truncate(folder / name, 0)
        refuse(folder, f"{name} has 0 bytes")

    def test_sparse_terabyte(self, folder, name, size_bytes):
        os.truncate(folder / name, 10**12)
        refuse(folder, f"{name} has 1000000000000 bytes")

    @pytest.mark.parametrize(
        ("position", "content"),
        [(0, b"\xff" * 8), (0, b"\0" * 8), (7, b"\x01"), (8, b"["), (16_383, b"\0")],
    )
    def test_other_header_bytes(self, folder, name, size_bytes, position, content):
        with (folder / name).open("r+b") as file:
            file.seek(position)
            file.write(content)
        refuse(folder, f"{name} is damaged: its header differs at offset {position}")

    def test_other_json_of_the_same_length(self, folder, name, size_bytes):
        with (folder / name).open("r+b") as file:
            head = file.read(16_384)
            other = head.replace(b'"dtype":"U8"', b'"dtype":"I8"').replace(b"[6,5]", b"[5,6]")
            file.seek(0)
            file.write(other)
        assert json.loads(other[8:]) != json.loads(head[8:])
        differs = next(i for i, (a, b) in enumerate(zip(head, other, strict=True)) if a != b)
        refuse(folder, f"{name} is damaged: its header differs at offset {differs}")


def test_the_unchanged_store_opens(folder, good):
    with frugal():
        assert open_store(folder).manifest == good.manifest
