"""What a writer accepts as contents, and that all of it reaches the file."""

import os
import random

import numpy as np
import pytest

from flashmoe.base.errors import StoreError
from flashmoe.store.layout import TensorSpec, safetensors_header
from flashmoe.store.manifest import JOURNAL_NAME
from flashmoe.store.reader import is_store
from flashmoe.store.writer import StoreWriter
from tests.support.stores import (
    LAYER_FILE,
    RESIDENT_FILE,
    folder_content,
    layer_contents,
    layer_layout,
    record_parts,
    write_one_layer,
)

pytestmark = pytest.mark.usefixtures("fast_disk")


def test_components_in_any_order(dest, one_layer_files):
    layout = layer_layout()
    contents = layer_contents(layout)
    parts = [
        (layout.record_offset(expert) + c.offset, record_parts(layout, contents, expert)[c.name])
        for c in layout.record.components
        for expert in range(layout.n_experts)
    ]
    random.Random(0).shuffle(parts)
    with StoreWriter(dest) as writer:
        writer.create(layout.file, layout.header, layout.file_bytes)
        for offset, part in parts:
            writer.write(layout.file, offset, part)
    assert (dest / LAYER_FILE).read_bytes() == one_layer_files[0][LAYER_FILE]


def test_any_buffer(dest):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = TensorSpec("x", "F32", (3, 4))
    header = safetensors_header([tensor])
    with StoreWriter(dest) as writer:
        for content in (values, memoryview(values), bytearray(values.tobytes())):
            writer.create(RESIDENT_FILE, header, len(header) + tensor.nbytes)
            writer.write(RESIDENT_FILE, len(header), content)
            writer.close(RESIDENT_FILE)
            assert (dest / RESIDENT_FILE).read_bytes()[16_384:] == values.tobytes()


def test_what_an_interrupted_run_wrote_is_there(dest):
    with StoreWriter(dest) as writer:
        writer.create(RESIDENT_FILE, b"header", 20)
        writer.write(RESIDENT_FILE, 10, b"whole")
    with StoreWriter(dest, keep=lambda: True) as writer:
        assert writer.resumed
        writer.create(RESIDENT_FILE, b"header", 20)
        writer.write(RESIDENT_FILE, 17, b"new")
    assert (dest / RESIDENT_FILE).read_bytes() == b"header\0\0\0\0whole\0\0new"


@pytest.mark.parametrize("options", [{}, {"keep": lambda: False}, {"force": True}])
def test_what_an_interrupted_run_wrote_is_gone(dest, options):
    with StoreWriter(dest) as writer:
        writer.create(RESIDENT_FILE, b"header", 20)
        (dest / JOURNAL_NAME).write_bytes(b"pages")
    with StoreWriter(dest, **options) as writer:
        assert not writer.resumed
        assert not (dest / RESIDENT_FILE).exists()
        assert not (dest / JOURNAL_NAME).exists()


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
