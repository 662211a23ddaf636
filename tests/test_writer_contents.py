"""What a writer accepts as contents, and that all of it reaches the file."""

import os

import numpy as np
import pytest
from stores import (
    LAYER_FILE,
    RESIDENT_FILE,
    RESIDENT_TENSORS,
    folder_content,
    layer_contents,
    layer_layout,
    write_one_layer,
)

from flashmoe.errors import StoreError
from flashmoe.store.layout import TensorSpec
from flashmoe.store.reader import is_store
from flashmoe.store.writer import StoreWriter, sha256_file

pytestmark = pytest.mark.usefixtures("fast_disk")


def test_components_in_any_order(dest, one_layer_files):
    layout = layer_layout()
    contents = layer_contents(layout)
    with StoreWriter(dest) as writer:
        layer = writer.layer(layout)
        for component in reversed(layout.record.components):
            layer.write(component, contents[component.name])
        layer.finish()
    assert (dest / LAYER_FILE).read_bytes() == one_layer_files[0][LAYER_FILE]


def test_any_buffer(dest):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = TensorSpec("x", "F32", (3, 4))
    with StoreWriter(dest) as writer:
        for content in (values, memoryview(values), bytearray(values.tobytes())):
            shard = writer.write_resident(RESIDENT_FILE, [tensor], [content])
            assert (dest / RESIDENT_FILE).read_bytes()[16_384:] == values.tobytes()
            assert shard.sha256 == sha256_file(dest / RESIDENT_FILE)


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_tensor_of_another_length(dest, extra):
    content = bytes(28 + extra)
    with StoreWriter(dest) as writer, pytest.raises(StoreError, match=r"norm\.weight has"):
        writer.write_resident(RESIDENT_FILE, [RESIDENT_TENSORS[1]], [content])


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_component_of_another_length(dest, extra):
    layout = layer_layout(0)
    component = layout.record.components[2]
    with StoreWriter(dest) as writer:
        layer = writer.layer(layout)
        with pytest.raises(StoreError, match=r"down_proj\.weight .* not 4 times 140"):
            layer.write(component, bytes(560 + extra))
        for part in layout.record.components:
            layer.write(part, bytes(4 * part.nbytes))
        layer.finish()


def test_a_checkpoint_file_called_like_the_manifest(dest, tmp_path):
    """Copied as it is, it would make an incomplete store look complete."""
    foreign = tmp_path / "flashmoe.json"
    foreign.write_bytes(b"{}")
    with StoreWriter(dest) as writer:
        with pytest.raises(StoreError, match=r"flashmoe\.json"):
            writer.copy(foreign)
        assert not is_store(dest)


@pytest.mark.parametrize("most", [1000, 4096])
def test_short_writes(dest, one_layer_files, monkeypatch, most):
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, view: write(fd, view[:most]))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:most], at))
    write_one_layer(dest)
    assert folder_content(dest) == one_layer_files[0]
