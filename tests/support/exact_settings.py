"""Settings of the engine that must not change a bit, and models that answer under them.

Used by the property test, which draws settings with Hypothesis, and by scripts/stress.py, which
draws them with seeds, in several threads, with faults and interrupts.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from flashmoe import FlashMoEModel, native
from flashmoe.bank.bank import LayerBank
from flashmoe.engine import build, decide
from flashmoe.generation.report import Report
from flashmoe.generation.token_state import TokenState
from flashmoe.io.files import uncached_problem
from flashmoe.io.mapped import MmapReader
from flashmoe.io.native import NativeReader
from flashmoe.io.reader import Priority, Reader
from flashmoe.io.threads import ThreadReader
from flashmoe.memory.budget import layer_demands
from flashmoe.model import predictor
from flashmoe.store.reader import Store
from flashmoe.streaming.experts import StreamedExperts
from flashmoe.streaming.prefill import ExpertPrefill
from tests.support.delaying import DelayingReader
from tests.support.wide import N_EXPERTS, TOP_K, WIDE, wide_store

NATIVE = native.available() is None
INNER: dict[str, type[Any]] = {"threads": ThreadReader, "mmap": MmapReader}
if NATIVE:
    INNER["native"] = NativeReader
VOCABULARY = 128


@dataclass(frozen=True)
class Setting:
    """One way to run a family's model, and what to ask it: two prompts, each continued.

    `slots` of every layer, `resized` those after the first prompt, 0 for the same; `staging`
    records per group, 0 for none; `bytes_per_second` of the emulated disk, 0 for none; `late`:
    requests end in any order.
    """

    family: str
    kernel: str
    slots: int
    resized: int
    staging: int
    prefetch: bool
    chunk: int
    reader: str
    page_cache: bool
    bytes_per_second: float
    late: bool
    prompt: int
    tokens: int
    seed: int


CHOICES: dict[str, tuple[Any, ...]] = {
    "family": tuple(WIDE),
    "kernel": ("cpu", "reference") if NATIVE else ("reference",),
    "slots": (TOP_K, TOP_K + 1, TOP_K + 2, 2 * TOP_K, N_EXPERTS - 2, N_EXPERTS),
    "resized": (0, 0, TOP_K, 2 * TOP_K, N_EXPERTS),
    "staging": (0, 2, 5, N_EXPERTS),
    "prefetch": (True, True, False),
    "chunk": (2, 5, 16, 64),
    "reader": tuple(INNER),
    "page_cache": (True, False),
    "bytes_per_second": (0, 100e6, 1e9),
    "late": (False, True),
    "prompt": (1, 2, 7, 20),
    "tokens": (1, 5, 11),
    "seed": tuple(range(8)),
}


def prompts(setting: Setting) -> list[list[int]]:
    """Two prompts, each with the tokens that it is continued by."""
    draw = random.Random(setting.seed)
    lengths = [setting.prompt, max(1, setting.prompt // 2)]
    return [draw.choices(range(VOCABULARY), k=n + setting.tokens) for n in lengths]


def logits(
    model: FlashMoEModel, setting: Setting, building: threading.Lock | None = None
) -> Iterator[bytes]:
    """After each prompt and each further token, the logits' bytes; `building` is held while banks
    are resized."""
    for number, ids in enumerate(prompts(setting)):
        if number and setting.resized:
            streaming = model._running.streaming
            assert streaming is not None
            with building or contextlib.nullcontext():
                streaming.resize([setting.resized] * len(streaming.layers))
        length = len(ids) - setting.tokens
        state = TokenState(model.model, model._running.meter.clock, setting.chunk)
        for fed in (ids[:length], *([token] for token in ids[length:])):
            with model._ledger.measuring(Report(), "decode"):
                row = state.feed(fed)
            assert row is not None
            yield np.array(row).tobytes()
            model.check_integrity()


class Trials:
    """Models of every family, plain and under settings; `with` makes the engine listen to them.

    `hits` counts the ways through the engine that were taken. `building` is held by the thread
    that makes or resizes banks: MLX waits for the work of every thread when its limits are set,
    with Python locked, and making a bank has MLX call Python.
    """

    def __init__(self, folder: Path) -> None:
        self.hits: Counter[str] = Counter()
        self.building = threading.Lock()
        self._folder = folder
        self._stores: dict[str, Store] = {}
        self._plain: dict[tuple[str, str], FlashMoEModel] = {}
        self._expected: dict[Setting, list[bytes]] = {}
        # What the thread's next model is to have.
        self._asked = threading.local()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Trials:
        for owner, name in ((build, "open_reader"), (decide, "_share_memory")):
            original = getattr(owner, name)
            replaced = getattr(self, f"_asked_{name.strip('_')}")
            self._patch(owner, name, lambda *a, o=original, r=replaced, **k: r(o, *a, **k))
        self._patch(predictor, "find_sites", self._cached(predictor.find_sites))
        ways = {
            ExpertPrefill: ("__call__",),
            LayerBank: ("_evict", "adopt", "resize"),
            StreamedExperts: ("_run_overlapped", "_run_grouped"),
        }
        for kind, names in ways.items():
            for name in names:
                self._patch(kind, name, self._counting(f"{kind.__name__}.{name}", kind, name))
        return self

    def __exit__(self, *_: object) -> None:
        for model in self._plain.values():
            model.close()
        self._stack.close()

    def expected(self, setting: Setting) -> list[bytes]:
        """What a full bank says that nothing is read ahead for, with the default reader."""
        key = replace(
            setting, slots=N_EXPERTS, resized=0, staging=N_EXPERTS, prefetch=False,
            reader="", page_cache=True, bytes_per_second=0, late=False
        )  # fmt: skip
        if key not in self._expected:
            plain = self._plain.get((setting.family, setting.kernel))
            if plain is None:
                self._asked.setting = None
                store = self.store(setting.family)
                with self.building:
                    plain = FlashMoEModel(store, cache="1GB", kernel=setting.kernel, prefetch=False)
                self._plain[setting.family, setting.kernel] = plain
            self._expected[key] = list(logits(plain, key))
        return self._expected[key]

    @contextlib.contextmanager
    def model(self, setting: Setting, **faults: float) -> Iterator[FlashMoEModel]:
        """A model under the setting, its reader failing as `faults` say to `DelayingReader`."""
        store = self.store(setting.family)
        units = [layer.layout.unit for layer in store.manifest.layers]
        slot_bytes = sum(demand.slot_bytes for demand in layer_demands(units, widen=False))
        self._asked.setting, self._asked.faults = setting, faults
        with self.building:
            made = FlashMoEModel(
                store,
                cache=setting.slots * slot_bytes,
                kernel=setting.kernel,
                prefetch=setting.prefetch,
            )
        with made as model:
            assert set(model.memory_plan.slots) == {setting.slots}
            try:
                yield model
            finally:
                reader = model._running.readers[0]
                if isinstance(reader, DelayingReader):
                    self.hits["prefetches cancelled"] += reader.cancelled[Priority.PREFETCH]
                    self.hits["prefetches begun"] += reader.begun[Priority.PREFETCH]
                stats = model.totals()
                self.hits["predictions"] += stats.prefetched
                self.hits["right predictions"] += stats.prefetched_used
                self.hits["bytes wasted"] += stats.bytes_wasted

    @staticmethod
    def mend(model: FlashMoEModel) -> None:
        """Have nothing fail any more."""
        assert isinstance(model._running.readers[0], DelayingReader)
        model._running.readers[0].mend()

    def store(self, family: str) -> Store:
        if family not in self._stores:
            self._stores[family] = wide_store(self._folder / family, family)
        return self._stores[family]

    def _asked_open_reader(self, original: Any, name: str, *, page_cache: bool) -> Reader:
        setting: Setting | None = self._asked.setting
        if setting is None:
            reader: Reader = original(name, page_cache=page_cache)
            return reader
        faults = self._asked.faults
        cached = setting.page_cache or setting.reader == "mmap" or self._needs_cache(setting)
        options = {} if setting.reader == "mmap" else {"page_cache": cached}
        inner: Reader = INNER[setting.reader](4, **options)
        if not setting.bytes_per_second and not setting.late and not faults:
            return inner
        return DelayingReader(
            inner,
            bytes_per_second=setting.bytes_per_second or float("inf"),
            delays=(0.0, 0.0, 0.0005, 0.002) if setting.late else (0.0,),
            seed=setting.seed,
            **faults,
        )

    def _asked_share_memory(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        plan = original(*args, **kwargs)
        setting: Setting | None = self._asked.setting
        if setting is None:
            return plan
        return replace(plan, prompts=replace(plan.prompts, group_records=setting.staging))

    def _needs_cache(self, setting: Setting) -> bool:
        store = self.store(setting.family)
        return uncached_problem(store.file(store.manifest.layers[0].layout.file)) is not None

    def _patch(self, owner: Any, name: str, replacement: Any) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, replacement))

    def _counting(self, key: str, owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.hits[key] += 1
            return original(*args, **kwargs)

        return call

    @staticmethod
    def _cached(find_sites: Any) -> Any:
        """Sites are the same for every model of a config, and take a while to find."""
        found: dict[str, Any] = {}

        def find(config: Any) -> Any:
            key = repr(sorted(config.items(), key=str))
            if key not in found:
                found[key] = find_sites(config)
            return found[key]

        return find
