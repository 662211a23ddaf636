"""What quantizing cost: one model beside a reference on the same text.

The models run one after the other, so they are never in memory together. The reference's logits
go to a temporary file as float32, all of them: 4 bytes per token and word of the vocabulary.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from flashmoe.base.errors import OptionError, PromptError, StoreError
from flashmoe.base.progress import Progress
from flashmoe.bench.divergence import Divergence, Tally
from flashmoe.engine.api import FlashMoEModel
from flashmoe.engine.model_cache import cache_folder
from flashmoe.engine.options import Options
from flashmoe.generation.prompt import encode_prompt
from flashmoe.store.reader import Store

DEFAULT_WINDOW = 512
# Of one forward pass.
LOGIT_BYTES = 2**26


@dataclass(frozen=True)
class EvalResult:
    """`divergence` of the model in `model` from that in `reference` over a text, read in windows
    of `window` tokens, each on its own and scored from its second token on. Sizes in bytes."""

    model: str
    reference: str
    window: int
    model_bytes: int
    reference_bytes: int
    divergence: Divergence


def evaluate(
    store: Store,
    reference: Store,
    text: str,
    *,
    options: Options | None = None,
    window: int = DEFAULT_WINDOW,
    max_tokens: int | None = None,
    progress: Progress = lambda done, total: None,
) -> EvalResult:
    """Compare `store` with `reference` on the first `max_tokens` tokens of a text.

    Both run with `options`. `progress(done, total)` counts tokens of both passes. Raises
    OptionError for a window below 2 tokens or beyond the context, or for models that read the text
    as different tokens, PromptError for a text of less than 2 tokens, StoreError when the disk has
    no room for the reference's logits.
    """
    if window < 2:
        raise OptionError(f"a window must have at least 2 tokens, not {window}")
    if max_tokens is not None and max_tokens < 2:
        raise OptionError(f"at least 2 tokens must be read, not {max_tokens}")
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    # Closed, and with that removed, whatever happens.
    with tempfile.TemporaryFile(dir=folder, prefix="logits-") as file:
        with FlashMoEModel(reference, options) as model:
            ids = _tokens(model, text, window, max_tokens)
            windows = [ids[i : i + window] for i in range(0, len(ids), window)]
            scored = sum(len(w) - 1 for w in windows)
            for done, logits in _passes(model, windows):
                if not file.tell():
                    _check_free_disk(folder, scored * logits.shape[1] * 4)
                logits.tofile(file)
                progress(done, 2 * scored)
            vocabulary = logits.shape[1]
        file.seek(0)
        targets = np.array([token for w in windows for token in w[1:]])
        with FlashMoEModel(store, options) as model:
            if _tokens(model, text, window, max_tokens) != ids:
                raise OptionError(
                    f"{store.path} reads the text as other tokens than {reference.path}; "
                    "only models with the same tokenizer can be compared"
                )
            for done, logits in _passes(model, windows):
                if logits.shape[1] != vocabulary:
                    raise OptionError(
                        f"{store.path} has {logits.shape[1]} logits and {reference.path} "
                        f"{vocabulary}; only models of one vocabulary can be compared"
                    )
                rows = len(logits)
                said = np.fromfile(file, np.float32, logits.size).reshape(rows, vocabulary)
                tally.add(said, logits, targets[done - rows : done])
                progress(scored + done, 2 * scored)
    return EvalResult(
        model=str(store.path),
        reference=str(reference.path),
        window=window,
        model_bytes=_bytes(store),
        reference_bytes=_bytes(reference),
        divergence=tally.result(),
    )


def _tokens(model: FlashMoEModel, text: str, window: int, max_tokens: int | None) -> list[int]:
    if window > model.context:
        raise OptionError(
            f"a window of {window} tokens exceeds the context of {model.context}; "
            "make it smaller or ask for a larger --context"
        )
    ids = encode_prompt(model.tokenizer, text, template=False)[:max_tokens]
    # A token alone in a window has nothing before it.
    if len(ids) % window == 1:
        ids = ids[:-1]
    if not ids:
        raise PromptError("the text has a single token; at least 2 are needed")
    return ids


def _passes(
    model: FlashMoEModel, windows: Sequence[Sequence[int]]
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Logits [tokens, vocabulary] in the order of the scored tokens, each before its token, and
    how many there were with them."""
    done = 0
    rows = 1
    for window in windows:
        cache = make_prompt_cache(model.model)
        fed = window[:-1]
        first = 0
        while first < len(fed):
            part = fed[first : first + rows]
            out = model.model(mx.array([part], mx.int32), cache=cache)[0].astype(mx.float32)
            mx.eval(out, [layer.state for layer in cache])
            first += len(part)
            done += len(part)
            yield done, np.array(out)
            # The first pass was of one token, to learn how many logits there are.
            most = max(LOGIT_BYTES // (4 * out.shape[-1]), 1)
            rows = min(most, model.memory_plan.prompts.chunk_tokens)


def _check_free_disk(folder: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise StoreError(
            f"the reference's logits take {size_bytes / 1e9:.1f} GB in {folder}, whose disk has "
            f"{free / 1e9:.1f} GB free; read fewer tokens (--tokens)"
        )


def _bytes(store: Store) -> int:
    return store.manifest.resident_bytes + store.manifest.streamed_bytes
