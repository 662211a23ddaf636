"""Train the demo model on WordNet: tokenizer first, then the weights, on a CPU.

    python scripts/demo_model/train.py --out runs/demo --minutes 80

The learning rate follows the clock, not the step count, so a run takes the minutes it was
given on any machine and learns as much as that machine manages. Ctrl-C saves and stops;
so does SIGTERM. `--resume` goes on from there. export.py turns the result into a model.
"""

import argparse
import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from batches import Batch, pack_batches, shuffled_dialogs
from facts import WORDNET_DIR, read_facts
from model import COMPUTE_DTYPE, DemoModel, ModelConfig
from tokenizers import Tokenizer
from vocabulary import dialog_encoder, train_tokenizer

ROWS = 32
ROW_TOKENS = 192
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 200
LEAST_RATE_FRACTION = 0.02
WEIGHT_DECAY = 0.01
BALANCE_LOSS_WEIGHT = 0.01
MAX_GRADIENT_NORM = 1.0
LOSS_SMOOTHING = 0.98

SAVE_SECONDS = 300
CHECKPOINT_NAME = "checkpoint.pt"
TOKENIZER_NAME = "tokenizer.json"


@dataclass
class Progress:
    """How far a run has come; saved with the weights."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    """Mean loss per answer token, an exponential average over some 50 steps."""

    def add_step(self, tokens: int, loss: float) -> None:
        self.steps += 1
        self.tokens += tokens
        first = math.isnan(self.loss)
        self.loss = loss if first else LOSS_SMOOTHING * self.loss + (1 - LOSS_SMOOTHING) * loss


def learning_rate(step: int, elapsed_fraction: float) -> float:
    """Linear warm-up over the first steps, times a half cosine over the run's time."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * elapsed_fraction))
    return PEAK_LEARNING_RATE * warmup * max(LEAST_RATE_FRACTION, cosine)


def make_optimizer(model: DemoModel) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), eps=1e-8)


def train_step(
    model: DemoModel, optimizer: torch.optim.Optimizer, batch: Batch, rate: float
) -> tuple[float, float]:
    """One update at learning rate `rate`; returns the answer loss and the balance loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=COMPUTE_DTYPE):
        logits, balance_loss = model(batch.inputs, batch.learned)
    answer_loss = F.cross_entropy(logits.float(), batch.targets[batch.learned])
    optimizer.zero_grad()
    (answer_loss + BALANCE_LOSS_WEIGHT * balance_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return answer_loss.item(), balance_loss.item()


class Run:
    """A training run in a directory: model, optimizer and progress, saved as one file."""

    def __init__(self, out: Path, config: ModelConfig) -> None:
        self.path = out / CHECKPOINT_NAME
        self.config = config
        self.model = DemoModel(config, positions=ROW_TOKENS)
        self.optimizer = make_optimizer(self.model)
        self.progress = Progress()

    def save(self) -> None:
        checkpoint = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        # Renamed into place: a run killed while it saves keeps its previous checkpoint.
        partial = self.path.with_suffix(".partial")
        torch.save(checkpoint, partial)
        partial.replace(self.path)

    def load(self) -> None:
        checkpoint = torch.load(self.path, map_location="cpu")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.progress = Progress(**checkpoint["progress"])

    def train(
        self, batches: Iterator[Batch], minutes: float, log_every: int, stop: threading.Event
    ) -> None:
        """Train until `minutes` are used up, previous runs included, or `stop` is set."""
        progress = self.progress
        start = time.monotonic() - progress.seconds
        saved_at = progress.seconds
        seconds_before, tokens_before = progress.seconds, progress.tokens
        while not stop.is_set() and progress.seconds < 60 * minutes:
            rate = learning_rate(progress.steps, progress.seconds / (60 * minutes))
            batch = next(batches)
            answer_loss, balance_loss = train_step(self.model, self.optimizer, batch, rate)
            progress.add_step(ROWS * (ROW_TOKENS + 1), answer_loss)
            progress.seconds = time.monotonic() - start
            if progress.steps % log_every == 0:
                speed = (progress.tokens - tokens_before) / (progress.seconds - seconds_before)
                print(
                    f"step {progress.steps}  loss {progress.loss:.3f}  balance {balance_loss:.2f}"
                    f"  lr {rate:.1e}  {speed:,.0f} tokens/s  {progress.tokens / 1e6:.1f} M tokens"
                    f"  ETA {max(0.0, minutes - progress.seconds / 60):.1f} min",
                    flush=True,
                )
            if progress.seconds - saved_at > SAVE_SECONDS:
                self.save()
                saved_at = progress.seconds
        self.save()


def stop_on_signal() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C ends the process at once."""
    stop = threading.Event()

    def request_stop(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    return stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wordnet", type=Path, default=WORDNET_DIR)
    parser.add_argument("--out", type=Path, required=True, help="directory for the run's files")
    parser.add_argument("--minutes", type=float, default=80.0, help="default: 80")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    args = parser.parse_args()
    has_checkpoint = (args.out / CHECKPOINT_NAME).exists()
    if has_checkpoint and not args.resume:
        parser.error(f"{args.out} has a checkpoint: add --resume or choose another --out")
    if args.resume and not has_checkpoint:
        parser.error(f"{args.out} has no checkpoint to resume")

    args.out.mkdir(parents=True, exist_ok=True)
    facts = read_facts(args.wordnet)
    tokenizer_path = args.out / TOKENIZER_NAME
    if not tokenizer_path.exists():
        train_tokenizer(facts).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))

    torch.manual_seed(args.seed)
    run = Run(args.out, ModelConfig(vocab_size=tokenizer.get_vocab_size()))
    if args.resume:
        run.load()
    parameters = sum(weight.numel() for weight in run.model.parameters())
    print(
        f"{len(facts):,} facts, vocabulary {tokenizer.get_vocab_size():,},"
        f" {parameters / 1e6:.1f} M parameters",
        flush=True,
    )
    # A resumed run continues with other dialogs, not with a repeat of its first ones.
    rng = random.Random(args.seed + run.progress.steps)
    batches = pack_batches(
        shuffled_dialogs(facts, rng), dialog_encoder(tokenizer), ROWS, ROW_TOKENS
    )
    stop = stop_on_signal()
    run.train(batches, args.minutes, args.log_every, stop)
    ending = "stopped early; --resume goes on" if stop.is_set() else "done"
    print(f"{ending}: {run.progress.steps} steps, loss {run.progress.loss:.3f}, {run.path}")


if __name__ == "__main__":
    main()
