"""The format of traces: what is written is read, and what is damaged is refused."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe.base.errors import OptionError, SourceError
from flashmoe.bench.trace_file import TracedLayer, TraceWriter, read_trace
from tests.support.refusals import refused
from tests.support.traces import LAYERS, STEPS, TOKENS, drawn_experts, write_trace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.trace"


def test_round_trip(path: Path) -> None:
    experts = write_trace(path)
    trace = read_trace(path)
    assert (trace.model, trace.layers, trace.prompts) == ("tiny", LAYERS, 2)
    np.testing.assert_array_equal(trace.experts, experts)
    np.testing.assert_array_equal(trace.routed(0), experts[:, :2])
    np.testing.assert_array_equal(trace.routed(1), experts[:, 2:])
    assert trace.step_tokens.tolist() == [count for _, count in STEPS]
    assert trace.step_prompt.tolist() == [prompt for prompt, _ in STEPS]
    assert list(path.parent.iterdir()) == [path]


def test_any_safetensors_reader_opens_it(path: Path) -> None:
    experts = write_trace(path)
    tensors, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    np.testing.assert_array_equal(np.array(tensors["experts"]), experts)
    assert np.array(tensors["step_prompt"]).tolist() == [prompt for prompt, _ in STEPS]
    assert json.loads(metadata["flashmoe_trace"])["layers"][1]["n_experts"] == 6


def test_bytes(path: Path) -> None:
    """The layout that the docstring states, byte by byte."""
    experts = write_trace(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    counts = [count for _, count in STEPS], [prompt for prompt, _ in STEPS]
    data = experts.astype("<u2").tobytes() + b"".join(struct.pack("<5I", *x) for x in counts)
    assert content[8 + length :] == data
    header = json.loads(content[8 : 8 + length])
    assert header["experts"] == {"dtype": "U16", "shape": [TOKENS, 5], "data_offsets": [0, 100]}
    assert (8 + length) % 8 == 0


def test_an_interrupted_recording_leaves_nothing(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TraceWriter(path, "tiny", LAYERS) as writer:
        writer.add_step(0, drawn_experts())
        assert not path.exists()
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []


def test_an_interrupted_recording_leaves_the_trace_before(path: Path) -> None:
    write_trace(path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), TraceWriter(path, "tiny", LAYERS):
        raise KeyboardInterrupt
    assert path.read_bytes() == before


def test_recording_keeps_little_in_memory(path: Path) -> None:
    import tracemalloc

    rows = np.zeros((500, 5), np.uint16)
    tracemalloc.start()
    with TraceWriter(path, "tiny", LAYERS) as writer:
        for _ in range(1000):
            writer.add_step(0, rows)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        writer.finish()
    # 5 MB were written.
    assert peak_bytes < 500_000
    assert len(read_trace(path).experts) == 500_000


def test_too_many_experts(path: Path) -> None:
    with pytest.raises(OptionError, match="65,536"):
        TraceWriter(path, "tiny", [TracedLayer("layers.0", 70_000, 2, 4096)])


def rewrite(path: Path, change: str, to: str) -> None:
    """Replace something in the header by something that is as long."""
    content = path.read_bytes()
    assert content.count(change.encode()) >= 1
    assert len(change) == len(to)
    path.write_bytes(content.replace(change.encode(), to.encode(), 1))


DAMAGE = {
    "version": ('\\"version\\": 1', '\\"version\\": 2', "version 2"),
    "another file": ("flashmoe_trace", "flashmoe_TRACE", "no trace"),
    "description": ('\\"version\\": 1', '\\"version\\": {', "description"),
    "layer without a path": ('\\"path\\"', '\\"pfad\\"', "description"),
    "fewer experts": ('\\"n_experts\\": 8', '\\"n_experts\\": 4', "layers.0"),
    "no experts": ('\\"n_experts\\": 8', '\\"n_experts\\": 0', "layer"),
    "text for a count": ('\\"n_experts\\": 8', '\\"n_experts\\":[]', "layer"),
    "top-k above the experts": ('\\"top_k\\": 2', '\\"top_k\\": 9', "9 of 8"),
    "other columns": ('\\"top_k\\": 2', '\\"top_k\\": 1', "5 experts per token"),
    "dtype": ('"U16","shape":[10,5]', '"F16","shape":[10,5]', "F16"),
    "tensor name": ('"step_prompt"', '"step_person"', "step_person"),
    "tensor shape": ("[10,5]", "[5,10]", "10 experts per token"),
    "no JSON": ('{"__metadata__"', '["__metadata__"', "header"),
}


@pytest.mark.parametrize(("change", "to", "word"), DAMAGE.values(), ids=DAMAGE)
def test_damage(path: Path, change: str, to: str, word: str) -> None:
    write_trace(path)
    rewrite(path, change, to)
    with refused(SourceError, str(path), word):
        read_trace(path)


def test_steps_that_do_not_add_up(path: Path) -> None:
    write_trace(path)
    content = bytearray(path.read_bytes())
    content[-40:-36] = struct.pack("<I", 5)
    path.write_bytes(content)
    with refused(SourceError, str(path), "10 tokens"):
        read_trace(path)


@pytest.mark.parametrize("size", [0, 5, 100, -1, -50])
def test_truncated(path: Path, size: int) -> None:
    write_trace(path)
    path.write_bytes(path.read_bytes()[:size])
    with refused(SourceError, str(path)):
        read_trace(path)


def test_empty(path: Path) -> None:
    with TraceWriter(path, "tiny", LAYERS) as writer:
        writer.finish()
    with refused(SourceError, str(path), "empty"):
        read_trace(path)


def test_missing(path: Path) -> None:
    with refused(SourceError, str(path)):
        read_trace(path)
