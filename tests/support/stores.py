"""Tiny stores made through `StoreWriter`, without any model, and how opening them may fail."""

import contextlib
import itertools
import random
import signal
import tracemalloc
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flashmoe.base.errors import StoreError
from flashmoe.store.layout import (
    LayerLayout,
    Quantization,
    TensorSpec,
    lay_out_record,
    safetensors_header,
)
from flashmoe.store.manifest import LayerFile, Manifest, ResidentFile, Source
from flashmoe.store.reader import Store, open_store
from flashmoe.store.writer import StoreWriter, sha256_file
from tests.support.refusals import refused

CONFIG = b'{"model_type": "tiny"}\n'
LAYER_FILE = "experts/layer-000.safetensors"
RESIDENT_FILE = "resident-00001-of-00001.safetensors"
ONE_LAYER_FILES = ["config.json", LAYER_FILE, "flashmoe.json", RESIDENT_FILE]
SOURCE = Source("owner/tiny", "main", {"model.safetensors": "ab" * 32})

# 4 KiB exactly (no padding behind it), 192 and 140 bytes: components at 0, 4096 and 8192.
EXPERT_TENSORS = (
    TensorSpec("gate_proj.weight", "U32", (32, 32)),
    TensorSpec("gate_proj.scales", "BF16", (32, 3)),
    TensorSpec("down_proj.weight", "F16", (5, 14)),
)
RESIDENT_TENSORS = (
    TensorSpec("embed.weight", "BF16", (6, 5)),
    TensorSpec("norm.weight", "F32", (7,)),
)

Contents = Mapping[str, bytes]


def layer_layout(
    index: int = 0,
    tensors: Sequence[TensorSpec] = EXPERT_TENSORS,
    *,
    n_experts: int = 4,
    top_k: int = 2,
) -> LayerLayout:
    return LayerLayout(
        path=f"model.layers.{index}.mlp.switch_mlp",
        kind="SwitchGLU",
        file=f"experts/layer-{index:03d}.safetensors",
        n_experts=n_experts,
        top_k=top_k,
        record=lay_out_record(tensors),
        projections={"gate_proj": Quantization(4, 64)},
    )


def layer_contents(layout: LayerLayout, seed: int = 0) -> dict[str, bytes]:
    """Random bytes for each component of all experts."""
    draw = random.Random(seed)
    return {c.name: draw.randbytes(layout.n_experts * c.nbytes) for c in layout.record.components}


def resident_contents(seed: int = 0) -> list[bytes]:
    draw = random.Random(1000 + seed)
    return [draw.randbytes(tensor.nbytes) for tensor in RESIDENT_TENSORS]


def write_resident(writer: StoreWriter, contents: Sequence[bytes]) -> ResidentFile:
    """`RESIDENT_TENSORS` in `RESIDENT_FILE`, the last one first."""
    header = safetensors_header(RESIDENT_TENSORS)
    ends = list(itertools.accumulate(map(len, contents), initial=len(header)))
    writer.create(RESIDENT_FILE, header, ends[-1])
    for offset, content in reversed(list(zip(ends, contents, strict=False))):
        writer.write(RESIDENT_FILE, offset, content)
    crc32 = "".join(f"{zlib.crc32(content):08x}" for content in contents)
    return ResidentFile(RESIDENT_FILE, RESIDENT_TENSORS, finished(writer, RESIDENT_FILE), crc32)


def write_layer(writer: StoreWriter, layout: LayerLayout, contents: Contents) -> LayerFile:
    """A layer's file, component by component."""
    writer.create(layout.file, layout.header, layout.file_bytes)
    crcs: dict[tuple[int, str], str] = {}
    for expert in range(layout.n_experts):
        for name, part in record_parts(layout, contents, expert).items():
            crcs[expert, name] = f"{zlib.crc32(part):08x}"
    for c in layout.record.components:
        for expert in range(layout.n_experts):
            part = record_parts(layout, contents, expert)[c.name]
            writer.write(layout.file, layout.record_offset(expert) + c.offset, part)
    return LayerFile(layout, finished(writer, layout.file), "".join(crcs.values()))


def finished(writer: StoreWriter, file: str) -> str:
    """SHA-256 of a file that is on disk and closed."""
    writer.sync(file)
    writer.close(file)
    return sha256_file(writer.folder / file)


def write_store(
    folder: Path,
    layers: Sequence[tuple[LayerLayout, Contents]],
    resident: Sequence[bytes],
    *,
    force: bool = False,
    source: Source = SOURCE,
) -> None:
    """One whole run of a writer: residents, layers, config.json, commit."""
    config = folder.parent / "config.json"
    config.write_bytes(CONFIG)
    with StoreWriter(folder, force=force) as writer:
        shard = write_resident(writer, resident)
        files = [write_layer(writer, layout, contents) for layout, contents in layers]
        writer.commit(
            Manifest(
                model_type="tiny",
                parameters=12345,
                source=source,
                quantization={"embed": Quantization(8, 32)},
                resident=(shard,),
                layers=tuple(files),
                copied={"config.json": writer.copy(config)},
            )
        )


def write_tiny(folder: Path, seed: int = 0, *, n_layers: int = 2, force: bool = False) -> None:
    layouts = [layer_layout(index) for index in range(n_layers)]
    layers = [(layout, layer_contents(layout, seed + i)) for i, layout in enumerate(layouts)]
    write_store(folder, layers, resident_contents(seed), force=force)


def write_one_layer(folder: Path, seed: int = 0, *, force: bool = False) -> None:
    """A store of one layer; `ONE_LAYER_FILES` are its files."""
    write_tiny(folder, seed, n_layers=1, force=force)


def folder_content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tiny_store(folder: Path, seed: int = 0, *, n_layers: int = 2) -> Store:
    """A complete store of `n_layers` layers with 4 experts of 3 components each, top-k 2."""
    write_tiny(folder, seed, n_layers=n_layers)
    return open_store(folder)


def record_parts(layout: LayerLayout, contents: Contents, expert: int) -> dict[str, bytes]:
    """One expert's part of each component."""
    return {
        c.name: contents[c.name][expert * c.nbytes : (expert + 1) * c.nbytes]
        for c in layout.record.components
    }


@contextlib.contextmanager
def frugal(limit_bytes: int = 5_000_000, seconds: float = 1.0) -> Iterator[None]:
    """Fails when the block allocates more Python memory than the limit, or hangs."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    try:
        yield
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert peak_bytes < limit_bytes


def refuse_to_open(folder: Path, *words: str) -> None:
    """`open_store` gives up quickly, in little memory, with an error that says every word."""
    with frugal(), refused(StoreError, *words):
        open_store(folder)
