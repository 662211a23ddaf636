"""The tokenizer of a checkpoint, whichever files it comes in.

mlx-lm loads what has a tokenizer.json. A checkpoint with a SentencePiece `tokenizer.model` alone
(Llama, Mixtral) is converted here, because transformers 5 does so without the model's dummy
prefix and BOS token, and mlx-lm then streams bytes twice.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from flashmoe.base.errors import PromptError, SourceError

# A checkpoint with none of these has no tokenizer, and can be given token ids only.
TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "*.tiktoken", "*.model")
SPACE = "\u2581"


def load_tokenizer(folder: Path, eos_token_ids: int | list[int] | None, vocabulary: int) -> Any:
    """mlx-lm's TokenizerWrapper for a folder, or a MissingTokenizer where there is none.

    Code that a checkpoint brings along is never run. Raises SourceError when there are
    tokenizer files but no tokenizer can be made of them.
    """
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_PATTERNS):
        return MissingTokenizer(vocabulary, eos_token_ids)
    from mlx_lm.tokenizer_utils import load

    is_sentencepiece = (folder / "tokenizer.model").is_file()
    try:
        if is_sentencepiece and not (folder / "tokenizer.json").is_file():
            tokenizer = _from_sentencepiece(folder, eos_token_ids)
        else:
            tokenizer = load(folder, {"trust_remote_code": False}, eos_token_ids=eos_token_ids)
        # Sessions check their context themselves; transformers would only warn on stderr.
        tokenizer.model_max_length = sys.maxsize
        empty = len(tokenizer) <= len(tokenizer.all_special_ids)
    except Exception as error:  # tokenizer classes raise what they like
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = " ".join(line.strip() for line in lines[:3])[:300]
        raise SourceError(f"{folder} has no tokenizer that can be loaded: {reason}") from error
    if empty:
        raise SourceError(f"{folder} has a tokenizer without a vocabulary; a file is missing")
    return tokenizer


def _from_sentencepiece(folder: Path, eos_token_ids: int | list[int] | None) -> Any:
    from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper
    from sentencepiece import sentencepiece_model_pb2 as protobuf
    from tokenizers import decoders, normalizers
    from transformers import AutoTokenizer

    messages: Any = protobuf
    proto = messages.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    config = folder / "tokenizer_config.json"
    stated = json.loads(config.read_text()) if config.is_file() else {}
    # As the model was trained: with BOS, unless its config says otherwise.
    options = {} if "add_bos_token" in stated else {"add_bos_token": proto.trainer_spec.bos_id >= 0}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    backend = tokenizer.backend_tokenizer
    dummy_prefix = proto.normalizer_spec.add_dummy_prefix
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        table = proto.normalizer_spec.precompiled_charsmap
        first = [normalizers.Precompiled(table)] if table else []
        backend.normalizer = normalizers.Sequence(
            [*first, normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
        backend.pre_tokenizer = None
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    ids = [eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids
    detokenizer = partial(SPMStreamingDetokenizer, trim_space=dummy_prefix)
    return TokenizerWrapper(tokenizer, detokenizer, eos_token_ids=ids)


class MissingTokenizer:
    """Lets token ids through and explains itself when it is asked for anything about text."""

    has_chat_template = False

    def __init__(self, vocabulary: int, eos_token_ids: int | list[int] | None) -> None:
        self._vocabulary = vocabulary
        ids = [eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids
        self.eos_token_ids = set(ids or [])

    def __len__(self) -> int:
        return self._vocabulary

    def encode(self, text: str) -> list[int]:
        raise PromptError("this model has no tokenizer; give token ids instead of text")

    def decode(self, ids: Any) -> str:
        raise PromptError("this model has no tokenizer; its token ids have no text")

    @property
    def detokenizer(self) -> _Silent:
        return _Silent()


class _Silent:
    """mlx-lm's streaming detokenizer interface, printing nothing."""

    last_segment = ""

    def add_token(self, token: int) -> None:
        """Nothing becomes printable."""

    def finalize(self) -> None:
        """Nothing was held back."""
