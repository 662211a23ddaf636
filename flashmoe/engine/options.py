"""What a model is run with: every option of the engine, its default and its check."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashmoe.base.errors import OptionError
from flashmoe.base.units import parse_size
from flashmoe.io.select import resolve_reader
from flashmoe.kernels.select import resolve_kernel

DTYPES = ("auto", "float32", "stored")


@dataclass(frozen=True)
class Options:
    """Options of `FlashMoEModel`; none but the last two changes what an exact kernel computes,
    up to the rounding of another prefill chunk.

    memory: one number for the whole process ("24GB", or bytes); by default three quarters
        of what the machine has free. cache: the bank alone, "min" being one token's needs.
    kernel: "auto", "cpu", "metal" or "reference". context: most tokens of prompt and answer
        together (default 4096, or the model's own limit where that is lower).
    prefill_chunk: tokens of a prompt that are fed at once; by default as many as memory has room
        for, 256 to 2048, and 256 where the bank's size alone is given. Logits are byte-equal
        between memory sizes at the same chunk.
    dtype: "float32" widens 16-bit floats when they are loaded, "stored" keeps them;
        "auto" widens on CPUs, where MLX is several times faster in float32, and wherever the
        model's config states float32.
    reader: "pread", "mmap", or "auto", which means pread: by the native library where it
        was built, otherwise by Python threads.
    page_cache: whether records are read through the operating system's page cache; by
        default unless all of them do not fit into the memory that is left beside the process.
    prefetch: whether to predict each layer's experts from the layer before and read them early,
        where that turns out to pay; by default yes.
    share: whether other processes may run the same store at the same time. Each would take the
        memory that it finds free; without it, the one that comes second is refused.
    warm_start: whether the experts that are in the bank at the end are remembered (their numbers,
        in the cache folder, for this store), and read again in free time when the store is next
        loaded with this on. The commands have it on; here it is off, so that what a program
        reads does not depend on what ran before.
    tuned: whether what `flashmoe tune` stored for this store and machine decides what is left
        open here.
    experts_per_token: LOSSY: fewer experts per token than the model was trained with.
    route_bias: LOSSY: while decoding, an expert that a token is routed to and that is not in the
        bank gives way to one that is and whose router logit is at most this much lower; 0 is off.
        What is generated then depends on the bank's contents, and so on what was asked before,
        on the memory given and on what happened to be prefetched.

    Raises OptionError for a value that is wrong for every model.
    """

    memory: str | int | None = None
    cache: str | int | None = None
    kernel: str = "auto"
    context: int | None = None
    prefill_chunk: int | None = None
    dtype: str = "auto"
    reader: str = "auto"
    page_cache: bool | None = None
    prefetch: bool | None = None
    share: bool = False
    warm_start: bool = False
    tuned: bool = True
    experts_per_token: int | None = None
    route_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_size(self.memory)
        if self.cache is not None and self.cache != "min":
            parse_size(self.cache)
        resolve_kernel(self.kernel)
        resolve_reader(self.reader, self.page_cache)
        if self.context is not None and self.context < 1:
            raise OptionError(f"context must be at least 1 token, not {self.context}")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise OptionError(f"a prefill chunk has at least 1 token, not {self.prefill_chunk}")
        if self.experts_per_token is not None and self.experts_per_token < 1:
            raise OptionError(f"experts per token must be at least 1, not {self.experts_per_token}")
        if not 0 <= self.route_bias < math.inf:
            raise OptionError(f"the route bias must be a number from 0 up, not {self.route_bias}")
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype must be auto, float32 or stored, not {self.dtype!r}")
