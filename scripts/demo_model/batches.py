"""Dialogs about all facts, endlessly, packed into training batches of equal rows."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from facts import Dialog, Fact, make_dialog
from torch import Tensor
from vocabulary import EncodedDialog

POSITIONS_MULTIPLE = 256


@dataclass(frozen=True)
class Batch:
    inputs: Tensor
    """Token ids [rows, length], int64."""
    targets: Tensor
    """The token after each input token, flat [rows * length], int64."""
    learned: Tensor
    """Positions in `targets` to learn [n], int64, ascending; n is a multiple of 256."""


def shuffled_dialogs(facts: list[Fact], rng: random.Random) -> Iterator[Dialog]:
    """One dialog per fact, in a new order and with new questions every epoch, for ever."""
    while True:
        order = list(range(len(facts)))
        rng.shuffle(order)
        for index in order:
            yield make_dialog(facts[index], rng)


def pack_batches(
    dialogs: Iterator[Dialog],
    encode_dialog: Callable[[Dialog], EncodedDialog],
    rows: int,
    length: int,
) -> Iterator[Batch]:
    """Batches of `rows` rows of `length` tokens, cut from the dialogs laid end to end.

    Dialogs may be cut at the end of a row, and attend to those before them in it.
    """
    needed = rows * (length + 1)
    tokens: list[int] = []
    learned: list[bool] = []
    while True:
        while len(tokens) < needed:
            more_tokens, more_learned = encode_dialog(next(dialogs))
            tokens += more_tokens
            learned += more_learned
        ids = torch.tensor(tokens[:needed]).view(rows, length + 1)
        mask = torch.tensor(learned[:needed]).view(rows, length + 1)
        del tokens[:needed], learned[:needed]
        positions = mask[:, 1:].flatten().nonzero()[:, 0]
        # A new shape costs oneDNN a new kernel, so the last few positions go unlearned.
        usable = len(positions) // POSITIONS_MULTIPLE * POSITIONS_MULTIPLE
        yield Batch(ids[:, :-1], ids[:, 1:].flatten(), positions[:usable])
