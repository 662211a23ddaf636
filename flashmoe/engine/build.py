"""Building what a plan says: a model that runs. Acts, and decides nothing."""

from __future__ import annotations

import threading

import mlx.core as mx

from flashmoe.bank.meter import Meter
from flashmoe.bank.warm_start_file import WarmStartFile
from flashmoe.checkpoint.kv_memory import STEP_TOKENS
from flashmoe.engine.model_cache import cache_folder
from flashmoe.engine.plan import RunPlan
from flashmoe.io.reader import Reader
from flashmoe.io.select import open_reader, resolve_reader
from flashmoe.kernels.select import select_kernel, select_prompt_kernel
from flashmoe.memory.balance import Balance
from flashmoe.memory.governor import LOOK_TOKENS, Governor, Limits
from flashmoe.model.load import (
    Kernels,
    RecordReaders,
    StreamingModel,
    build_skeleton,
    load_resident,
    stream_experts,
    use_native_attention,
    use_native_linears,
)
from flashmoe.model.predictor import find_predictors
from flashmoe.model.route_bias import prefer_resident
from flashmoe.probe.tuning import Reads
from flashmoe.store.reader import Store

WARM_START_FOLDER = "warm-start"
# MLX waits for its own threads with Python's lock held when limits are set, and reserving a bank
# has such a thread call Python: two models that load at once would wait for each other for ever
# (tests/engine/test_reloads.py). MLX's limits are the process's, and so is this.
_MLX_LIMITS = threading.Lock()


class RunningModel:
    """A model as its plan says: the module with its banks, the readers, the governor.

    Not for two threads at once; see `generation.turns`.
    """

    def __init__(self, plan: RunPlan, store: Store) -> None:
        self.plan = plan
        self.meter = Meter()
        self.streaming: StreamingModel | None = None
        self.governor: Governor | None = None
        self.readers: list[Reader] = []
        self._warm_start: WarmStartFile | None = None
        try:
            with _MLX_LIMITS:
                self._build(store)
        except BaseException:
            self.close()
            raise

    def _build(self, store: Store) -> None:
        plan, facts = self.plan, self.plan.facts
        skeleton = build_skeleton(store, facts.config)
        mx.set_cache_limit(plan.memory.mlx_cache_bytes)
        load_resident(skeleton, store, plan.needs.widen)
        if plan.kernel == "cpu":
            use_native_linears(skeleton, self.meter.clock)
        if plan.native_attention:
            use_native_attention(skeleton, self.meter.clock)
        self.streaming = stream_experts(
            skeleton,
            store,
            facts.layers,
            slots=plan.memory.slots,
            reading=self._open_readers(plan.reads),
            kernels=Kernels(
                select_kernel(plan.kernel, cache_folder()), select_prompt_kernel(plan.kernel)
            ),
            meter=self.meter,
            widen=plan.needs.widen_records,
            predict=find_predictors(skeleton, facts.config) if plan.prefetch else (),
        )
        if plan.governed:
            self.governor = govern(plan, self.streaming)
        # Predictors go on with the routers as they are.
        if plan.steerable:
            prefer_resident(self.streaming, plan.steerable, plan.options.route_bias)
        if plan.options.warm_start:
            self._warm_start = WarmStartFile(cache_folder() / WARM_START_FOLDER, store)
            self.streaming.warm_start(self._warm_start.read() or ())

    def _open_readers(self, reads: Reads) -> RecordReaders:
        decode = prefill = open_reader(reads.decode, page_cache=self.plan.page_cache)
        self.readers.append(decode)
        if resolve_reader(reads.prefill.reader) != resolve_reader(reads.decode.reader):
            prefill = open_reader(reads.prefill, page_cache=self.plan.page_cache)
        elif reads.prefill.depth != reads.decode.depth:
            prefill = decode.lane(reads.prefill.depth)
        if prefill is not decode:
            self.readers.append(prefill)
        return RecordReaders(decode, prefill, self.plan.memory.prompts.group_records)

    def forget_banks(self) -> None:
        """Have `close` not remember what the banks hold: a run that failed is no example."""
        self._warm_start = None

    def close(self) -> None:
        """Give back files, threads and memory; closing twice is fine.

        With `warm_start` it is also when the banks' experts are remembered, once some were used.
        """
        streaming, self.streaming = self.streaming, None
        if streaming is not None:
            streaming.stop_prefetch()
            if self._warm_start is not None and self.meter.counters.bytes_demanded:
                self._warm_start.write([bank.by_value() for bank in streaming.banks])
        for reader in self.readers:
            reader.close()
        self.readers = []
        if streaming is not None:
            streaming.close()
        self.governor = None


def govern(plan: RunPlan, streaming: StreamingModel) -> Governor:
    """What keeps a loaded model at the number of its plan."""
    needs, memory = plan.needs, plan.memory
    assert memory.total_bytes is not None
    in_place = streaming.resizes_in_place
    staged = memory.prompts.group_records > 0

    def coming(known: int, new: int, held: int) -> int:
        # Where resizing is dear, what prompts need is not lent to the banks between them.
        fed = new if in_place else max(new, memory.prompts.chunk_tokens)
        scratch = needs.scratch_bytes(fed, known + new, staged=staged)
        # As far as the next look.
        tokens = known + new + LOOK_TOKENS
        if needs.kv_bytes(tokens, filled=True) <= held:
            return scratch
        # Behind a part of a step, mlx-lm adds whole ones.
        tokens += STEP_TOKENS - 1
        # A layer's cache exists twice while it grows, and keys and values wait for being written.
        growing = max(needs.kv_bytes(tokens) - held, 0) + 2 * needs.largest_kv_bytes(tokens)
        return scratch + growing

    return Governor(
        Limits.of(
            memory.total_bytes, needs.demands, found_bytes=plan.found_bytes, in_place=in_place
        ),
        needs.demands,
        slots=streaming.slots,
        resize=streaming.resize,
        coming=coming,
        balance=Balance(needs.demands, streaming.uses) if in_place else None,
    )
