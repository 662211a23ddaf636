"""Reads that fail in the middle of an answer: the error names the place, and the model lives on."""

import errno
import os
import shutil

import pytest

from flashmoe import FlashMoEModel, ReadError
from flashmoe.engine import build
from tests.support.answers import BARN, BARN_ANSWER, HELLO, HELLO_ANSWER
from tests.support.reader_cases import POOLS


class Faulty:
    """preadv that fails from its `first`-th call on, until it is `repaired`."""

    def __init__(self, first):
        self.left = first
        self.repaired = False

    def __call__(self, descriptor, buffers, offset):
        self.left -= 1
        if self.left < 0 and not self.repaired:
            # Half a record, then the error: what the slot holds is neither old nor new.
            os.preadv(descriptor, [buffers[0][:100]], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)


@pytest.fixture(params=list(POOLS))
def faulty_demo(request, demo_store, monkeypatch):
    """The demo model with the smallest bank, and the preadv that its reader uses."""
    faulty = Faulty(10**9)
    pool = POOLS[request.param]
    monkeypatch.setattr(build, "open_reader", lambda name, page_cache: pool(8, faulty))
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        yield model, faulty


@pytest.mark.parametrize("first", [0, 1, 30, 200])
def test_a_read_error_in_the_middle(faulty_demo, first):
    small_demo, faulty = faulty_demo
    faulty.left = first
    session = small_demo.session()
    with pytest.raises(ReadError) as error:
        list(session.stream(BARN))
    assert error.value.errno == errno.EIO
    assert error.value.path.startswith(str(small_demo.store.path / "experts"))
    assert error.value.offset >= 16_384
    small_demo.check_integrity()
    with pytest.raises(ReadError):
        list(session.stream(BARN))
    faulty.repaired = True
    assert "".join(piece.text for piece in session.stream(BARN)) == BARN_ANSWER
    assert small_demo.generate(HELLO) == HELLO_ANSWER
    small_demo.check_integrity()


def test_a_file_that_shrinks(demo_store, dest):
    shutil.copytree(demo_store, dest)
    path = dest / "experts" / "layer-002.safetensors"
    content = path.read_bytes()
    with FlashMoEModel.from_pretrained(dest, cache="min") as model:
        pieces = model.stream(BARN)
        assert next(pieces).text == "An"
        os.truncate(path, 40_000)
        with pytest.raises(ReadError) as error:
            list(pieces)
        assert (error.value.path, error.value.errno) == (str(path), None)
        with path.open("r+b") as file:
            file.write(content)
        assert model.generate(BARN) == BARN_ANSWER
        model.check_integrity()


def test_a_file_that_disappears_before_it_is_opened(demo_store, dest):
    shutil.copytree(demo_store, dest)
    path = dest / "experts" / "layer-005.safetensors"
    away = dest / "away"
    with FlashMoEModel.from_pretrained(dest, cache="min") as model:
        path.rename(away)
        with pytest.raises(ReadError) as error:
            model.generate(HELLO)
        assert (error.value.path, error.value.errno) == (str(path), errno.ENOENT)
        away.rename(path)
        assert model.generate(HELLO) == HELLO_ANSWER
