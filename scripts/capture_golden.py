"""Capture golden vectors: tiny mixture-of-experts models run by Hugging Face transformers.

For each family this builds a small random float32 model from transformers' own config class, saves
it with `save_pretrained` exactly as transformers writes it, and records the logits of a prompt and
of a greedy continuation. The engine under test must reproduce them from the saved checkpoint.

This script needs torch and transformers. It knows nothing of mlx or of flashmoe, which is what
makes the vectors independent of the code they test.

    python scripts/capture_golden.py [FAMILY ...] [--out tests/golden]
"""

import argparse
import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from golden_families import FAMILIES
from golden_shared import VOCAB_SIZE
from safetensors.torch import save_file
from transformers import PreTrainedModel

PROMPT_TOKENS = 24
GREEDY_TOKENS = 8

# A seed is taken only if no routing decision and no greedy token lies closer to a tie than this.
# Float32 rounding moves the scores of these models by about 1e-5.
MIN_ROUTER_MARGIN = 1e-3
MIN_LOGIT_GAP = 1e-2
# Nor if logits move more than this when every weight is perturbed by one float32 rounding.
MAX_ROUNDING_NOISE = 2e-5
MAX_SEEDS = 300


@dataclass(frozen=True)
class Routing:
    """What one router call did."""

    experts_used: int
    experts: int
    margin: float


@dataclass(frozen=True)
class Golden:
    """The golden tensors (see tests/golden/README.md) and what tells whether `seed` is good."""

    tensors: dict[str, torch.Tensor]
    routings: list[Routing]
    rounding_noise: float
    seed: int

    @property
    def router_margin(self) -> float:
        return min(r.margin for r in self.routings)

    @property
    def logit_gap(self) -> float:
        best = self.tensors["greedy_logits"].topk(2, dim=-1).values
        return (best[:, 0] - best[:, 1]).min().item()

    @property
    def logit_std(self) -> float:
        return self.tensors["prompt_logits"].std().item()

    def flaw(self) -> str:
        """Return why this seed makes a poor golden vector, or an empty string."""
        if self.router_margin < MIN_ROUTER_MARGIN:
            return f"router margin {self.router_margin:.1e}"
        if self.logit_gap < MIN_LOGIT_GAP:
            return f"gap {self.logit_gap:.1e} between the best two logits"
        if self.rounding_noise > MAX_ROUNDING_NOISE:
            return f"rounding noise {self.rounding_noise:.1e}"
        if self.logit_std < 1:
            return f"logits with std {self.logit_std:.2f}"
        if any(r.experts_used < r.experts for r in self.routings):
            return "an expert that no token selects"
        if len(self.tensors["greedy_tokens"].unique()) < GREEDY_TOKENS // 2:
            return "greedy tokens that repeat"
        return ""


def randomize(model: PreTrainedModel, seed: int, stds: Mapping[str, float]) -> None:
    """Fill every parameter and router bias of `model` so that each one shows in the logits.

    The default initialization (std 0.02, zero biases, unit norms) gives near-zero signals and lets
    a forgotten bias or norm pass unseen. `stds` overrides the scale by name suffix.
    """
    generator = torch.Generator().manual_seed(seed)

    def std_of(name: str, tensor: torch.Tensor) -> float:
        for suffix, std in stds.items():
            if name.endswith(suffix):
                return std
        if name.endswith("norm.weight"):
            return 0.1
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            return 0.05
        if tensor.ndim == 1 or name.endswith("_bias"):
            return 0.5
        if name.endswith("embed_tokens.weight"):
            return 1.0
        # Gated products shrink the signal, hence a gain above one.
        return 1.5 * tensor.shape[-1] ** -0.5

    tensors = dict(model.named_parameters())
    tensors |= {name: b for name, b in model.named_buffers() if name.endswith("_bias")}
    for name, tensor in sorted(tensors.items()):
        value = torch.randn(tensor.shape, generator=generator) * std_of(name, tensor)
        if name.endswith("A_log"):
            value = torch.empty(tensor.shape).uniform_(1, 16, generator=generator).log()
        elif name.endswith("norm.weight"):
            # Added to the initial value because some families store the norm weight minus one.
            value += tensor
        tensor.copy_(value)


def top_k_margin(scores: torch.Tensor, top_k: int) -> float:
    """Return the least gap between the k-th and the next of `scores` [tokens, n].

    The gap is relative to the k-th score where that is larger than one.
    """
    best = scores.topk(top_k + 1, dim=-1).values
    gap = best[:, top_k - 1] - best[:, top_k]
    return (gap / best[:, top_k - 1].abs().clamp(min=1.0)).min().item()


def routing_margin(
    router: torch.nn.Module, logits: torch.Tensor, bias: torch.Tensor | None, top_k: int
) -> float:
    """Return how far router `logits` [tokens, experts] are from selecting other experts."""
    groups = getattr(router, "num_group", 1) or 1
    scores = logits if bias is None else logits.sigmoid() + bias
    if groups == 1:
        return top_k_margin(scores, top_k)
    grouped = scores.view(len(scores), groups, -1)
    # With a correction bias a group counts by its two best experts, otherwise by its best.
    group_scores = grouped.topk(1 if bias is None else 2, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(group_scores)
    kept.scatter_(1, group_scores.topk(router.topk_group, dim=-1).indices, 1)
    # Implementations disagree on whether a dropped group scores 0 or -inf. With a bias, the lower
    # bound of 0 takes a seed only if the k-th score is above 0, where both select the same experts.
    dropped = -torch.inf if bias is None else 0.0
    masked = grouped.masked_fill(kept[..., None] == 0, dropped).view_as(scores)
    return min(top_k_margin(group_scores, router.topk_group), top_k_margin(masked, top_k))


@contextmanager
def recorded_routing(model: PreTrainedModel) -> Iterator[list[Routing]]:
    """Collect one `Routing` per router call while the context is open."""
    routings: list[Routing] = []

    def record(
        router: torch.nn.Module,
        inputs: tuple[torch.Tensor, ...],
        outputs: tuple[torch.Tensor, ...],
    ) -> None:
        if len(outputs) == 2:  # the scores of all experts, zero where not selected, and the logits
            logits, selected = outputs[1], outputs[1].topk(router.top_k, dim=-1).indices
        else:
            logits, _, selected = outputs
        if (logits >= 0).all():  # probabilities
            logits = logits.log()
        # Some routers own their correction bias, others are given it.
        bias = inputs[1] if len(inputs) > 1 else getattr(router, "e_score_correction_bias", None)
        margin = routing_margin(router, logits, bias, selected.shape[-1])
        routings.append(Routing(len(selected.unique()), logits.shape[-1], margin))

    routers = [m for m in model.modules() if type(m).__name__.endswith("Router")]
    handles = [router.register_forward_hook(record) for router in routers]
    try:
        yield routings
    finally:
        for handle in handles:
            handle.remove()


def full_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return float32 logits [len(tokens), vocab] of one forward pass without a cache."""
    return model(input_ids=tokens[None], use_cache=False).logits[0].float()


def rounding_noise(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return the largest change of a logit when each weight is off by about one rounding."""
    generator = torch.Generator().manual_seed(0)
    perturbed = copy.deepcopy(model)
    for parameter in perturbed.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.mul_(1 + torch.finfo(torch.float32).eps * noise)
    return (full_logits(perturbed, tokens) - full_logits(model, tokens)).abs().max().item()


def compute_golden(model: PreTrainedModel, seed: int) -> Golden:
    """Run a random prompt and its greedy continuation, one full forward pass per token."""
    prompt = torch.randint(
        VOCAB_SIZE, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(seed)
    )
    prompt_logits = full_logits(model, prompt)
    tokens, rows = prompt, [prompt_logits[-1]]
    for _ in range(GREEDY_TOKENS - 1):
        tokens = torch.cat([tokens, rows[-1].argmax()[None]])
        with recorded_routing(model) as routings:
            rows.append(full_logits(model, tokens)[-1])
    greedy_logits = torch.stack(rows)
    tensors = {
        "prompt": prompt.int(),
        "prompt_logits": prompt_logits.contiguous(),
        "greedy_tokens": greedy_logits.argmax(dim=-1).int(),
        "greedy_logits": greedy_logits,
    }
    # The routings of the last pass cover every earlier token too.
    return Golden(tensors, routings, rounding_noise(model, tokens), seed)


def capture(name: str, out: Path) -> Golden:
    """Write `out/name/` from the first seed without a flaw and return what was written."""
    family = FAMILIES[name]
    model = family.auto_class.from_config(
        family.config(),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    ).eval()
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    for seed in range(MAX_SEEDS):
        model.load_state_dict(initial)
        randomize(model, seed, family.stds)
        golden = compute_golden(model, seed)
        if not golden.flaw():
            break
    else:
        raise SystemExit(f"{name}: no good seed below {MAX_SEEDS}, the last has {golden.flaw()}")

    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_original_format=family.original_format)
    save_file(golden.tensors, folder / "golden.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)
    return golden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", help=f"any of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    args = parser.parse_args()
    if unknown := sorted(set(args.family) - set(FAMILIES)):
        parser.error(f"unknown family {', '.join(unknown)}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(
        f"{'family':16}{'seed':>5}{'router margin':>15}{'logit gap':>11}"
        f"{'noise':>9}{'std':>6}{'KB':>6}"
    )
    with torch.inference_mode():
        for name in args.family or FAMILIES:
            golden = capture(name, args.out)
            kilobytes = sum(f.stat().st_size for f in (args.out / name).iterdir()) / 1e3
            print(
                f"{name:16}{golden.seed:5}{golden.router_margin:15.1e}{golden.logit_gap:11.3f}"
                f"{golden.rounding_noise:9.1e}{golden.logit_std:6.2f}{kilobytes:6.0f}"
            )


if __name__ == "__main__":
    main()
