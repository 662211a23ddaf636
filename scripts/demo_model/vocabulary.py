"""The demo model's tokenizer: a byte-level BPE over the dialogs, and the chat format.

Used by train.py and export.py; at inference the same format comes from CHAT_TEMPLATE.
"""

import functools
import random
from collections.abc import Callable

from facts import Dialog, Fact, make_dialog
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, START_TOKEN, END_TOKEN)  # their ids are their places here

CORPUS_SEED = 5  # fixed: every training run shares one vocabulary
DIALOGS_PER_FACT = 4

CHAT_TEMPLATE = (
    "{%- for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)

EncodedDialog = tuple[list[int], list[bool]]


def train_tokenizer(facts: list[Fact]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens, learned from a few dialogs about each fact."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(CORPUS_SEED)
    corpus = [
        text for fact in facts for _ in range(DIALOGS_PER_FACT) for text in make_dialog(fact, rng)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def dialog_encoder(tokenizer: Tokenizer) -> Callable[[Dialog], EncodedDialog]:
    """A function from a dialog to its tokens in the chat format, and which of them to learn.

    Learned are the answer and its end token; the question and the roles only condition it.
    """
    start = tokenizer.token_to_id(START_TOKEN)
    end = tokenizer.token_to_id(END_TOKEN)
    newline = tokenizer.encode("\n").ids
    user = [start, *tokenizer.encode("user\n").ids]
    assistant = [start, *tokenizer.encode("assistant\n").ids]

    @functools.cache  # the same few hundred thousand texts come back every epoch
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    def encode_dialog(dialog: Dialog) -> EncodedDialog:
        question, answer = dialog
        prompt = [*user, *encode(question), end, *newline, *assistant]
        reply = [*encode(answer), end]
        tokens = prompt + reply + newline
        learned = [False] * len(prompt) + [True] * len(reply) + [False] * len(newline)
        return tokens, learned

    return encode_dialog
