"""Manifests with a wrong value: it is refused by name, quickly and in little memory."""

import pytest

from tests.support.manifests import add, load_document, put, repeat, save_document
from tests.support.stores import LAYER_FILE, RESIDENT_FILE, refuse_to_open

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


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(store_folder, name):
    edit, words = MUTATIONS[name]
    document = load_document(store_folder)
    edit(document)
    save_document(store_folder, document)
    refuse_to_open(store_folder, words)
