"""Weight files on this disk: any range, past the page cache where whole blocks are asked for."""

import errno
import fcntl
import mmap

import numpy as np
import pytest

from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.files import BLOCK_BYTES, LocalFile
from flashmoe.probe.record_files import cached_share, evict
from tests.support.skips import needs, require

SIZE_BYTES = 40 * BLOCK_BYTES + 123


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(5).bytes(SIZE_BYTES)


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


def memory(n_bytes: int, shift: int = 0) -> memoryview:
    """Bytes that begin `shift` after a page does."""
    return memoryview(mmap.mmap(-1, shift + n_bytes))[shift:]


# An offset, how many bytes, and where in a page the memory is that they go to.
RANGES = (
    (0, SIZE_BYTES, 0),
    (0, 8 * BLOCK_BYTES, 0),
    (4 * BLOCK_BYTES, SIZE_BYTES - 4 * BLOCK_BYTES, 0),
    (39 * BLOCK_BYTES, BLOCK_BYTES + 123, 0),
    (BLOCK_BYTES, 2 * BLOCK_BYTES + 17, 0),
    (BLOCK_BYTES, 2 * BLOCK_BYTES, 8),
    (5, 3 * BLOCK_BYTES, 0),
    (7, 9, 7),
    (SIZE_BYTES, 0, 0),
)


@pytest.mark.parametrize(("offset", "n_bytes", "shift"), RANGES)
def test_any_range_is_read(path, content, offset, n_bytes, shift):
    out = memory(max(n_bytes, 1), shift)[:n_bytes]
    LocalFile(path).read_into(offset, out)
    assert out == content[offset : offset + n_bytes]


@needs("Linux")
def test_whole_blocks_do_not_fill_the_page_cache(path, content):
    assert evict([path])
    require("a page cache that can be emptied", not cached_share([path]))
    out = memory(32 * BLOCK_BYTES)
    LocalFile(path).read_into(0, out)
    assert cached_share([path]) == 0.0
    assert out == content[: len(out)]


@pytest.mark.parametrize("refuses", ["flag", "read"])
def test_a_file_system_that_knows_only_the_page_cache(path, content, monkeypatch, refuses):
    refused = []
    real = fcntl.fcntl

    def control(descriptor, command, argument=0):
        if command == getattr(fcntl, "F_NOCACHE", fcntl.F_SETFL):
            refused.append(argument)
            if refuses == "flag":
                raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", control)
    # Memory between blocks is what disks refuse, and what the file system is blamed for here.
    if refuses == "read":
        monkeypatch.setattr("flashmoe.checkpoint.files._address", lambda memory: 0)
    out = memory(32 * BLOCK_BYTES, 1) if refuses == "read" else memory(32 * BLOCK_BYTES)
    LocalFile(path).read_into(0, out)
    assert out == content[: len(out)]
    assert refused


def test_a_file_that_shrank_says_so(path):
    file = LocalFile(path)
    with path.open("r+b") as shrinking:
        shrinking.truncate(10 * BLOCK_BYTES)
    with pytest.raises(SourceError, match=f"ended at {10 * BLOCK_BYTES} while it was read"):
        file.read_into(0, memory(SIZE_BYTES))
