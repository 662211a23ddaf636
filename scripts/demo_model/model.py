"""The demo model in torch: Qwen3-MoE, written for training on a CPU in bfloat16.

Parameters are named as in Hugging Face's layout without its "model." prefix, except that
each layer's experts are stacked in two tensors (`gate_up`, `down`); export.py takes them
apart. Weights are kept in float32; forward passes compute in bfloat16 and belong in
`torch.autocast("cpu", dtype=COMPUTE_DTYPE)`. There is no KV cache and no generation.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPUTE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, under the names Hugging Face's `Qwen3MoeConfig` gives them."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 32
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, with the halves of a head paired as in transformers."""

    def __init__(self, head_dim: int, theta: float, positions: int) -> None:
        super().__init__()
        frequencies = 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(positions)[:, None] * frequencies[None]
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x [batch, heads, tokens, head_dim], whose first token is at position 0."""
        tokens = x.shape[-2]
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
        return x * self.cos[:tokens].to(x.dtype) + rotated * self.sin[:tokens].to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with RMS-normed queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        query_size = self.heads * self.head_dim
        kv_size = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: RotaryEmbedding) -> Tensor:
        batch, tokens, _ = x.shape
        query_shape = (batch, tokens, self.heads, self.head_dim)
        kv_shape = (batch, tokens, self.kv_heads, self.head_dim)
        queries = rotary(self.q_norm(self.q_proj(x).view(query_shape)).transpose(1, 2))
        keys = rotary(self.k_norm(self.k_proj(x).view(kv_shape)).transpose(1, 2))
        values = self.v_proj(x).view(kv_shape).transpose(1, 2)
        repeats = self.heads // self.kv_heads
        output = F.scaled_dot_product_attention(
            queries,
            keys.repeat_interleave(repeats, dim=1),
            values.repeat_interleave(repeats, dim=1),
            is_causal=True,
        )
        return self.o_proj(output.transpose(1, 2).reshape(batch, tokens, -1))


class SparseMoe(nn.Module):
    """Top-k experts as two batched matmuls over a fixed number of slots per expert.

    An expert has twice the slots that perfect balance would need. Tokens beyond that lose
    this expert's contribution, in training only: inference has no such limit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.moe_intermediate_size
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(hidden, self.num_experts, bias=False)
        self.gate_up = nn.Parameter(
            torch.randn(self.num_experts, hidden, 2 * intermediate) * hidden**-0.5
        )
        self.down = nn.Parameter(
            torch.randn(self.num_experts, intermediate, hidden)
            * intermediate**-0.5
            / math.sqrt(2 * config.num_hidden_layers)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, tokens, hidden] -> the same shape, and the load-balancing loss."""
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = self.gate(tokens).float().softmax(dim=-1)
        scores, experts = probabilities.topk(self.top_k, dim=-1)
        scores = scores / scores.sum(dim=-1, keepdim=True)
        balance_loss = load_balancing_loss(probabilities, experts)

        capacity = 2 * len(tokens) * self.top_k // self.num_experts
        slot_of_choice, token_of_slot = assign_slots(experts, self.num_experts, capacity)
        # Row len(tokens) is zeros: what an empty slot reads.
        padded = F.pad(tokens.to(COMPUTE_DTYPE), (0, 0, 0, 1))
        slots = padded.index_select(0, token_of_slot).view(self.num_experts, capacity, -1)
        gate, up = torch.bmm(slots, self.gate_up.to(COMPUTE_DTYPE)).chunk(2, dim=-1)
        output = torch.bmm(F.silu(gate) * up, self.down.to(COMPUTE_DTYPE)).flatten(0, 1)

        # And the last row is zeros again: what a choice without a slot gets back.
        output = F.pad(output, (0, 0, 0, 1)).index_select(0, slot_of_choice.flatten())
        output = output.view(len(tokens), self.top_k, -1)
        mixed = (output * scores[..., None].to(COMPUTE_DTYPE)).sum(dim=1)
        return mixed.view(x.shape), balance_loss


def load_balancing_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """Switch Transformer's loss (arXiv:2101.03961, eq. 4-6): 1 when the load is even.

    probabilities [tokens, num_experts] are the router's, experts [tokens, top_k] its picks.
    """
    num_experts = probabilities.shape[-1]
    load = torch.bincount(experts.flatten(), minlength=num_experts).float() / experts.numel()
    return num_experts * (load * probabilities.mean(dim=0)).sum()


def assign_slots(experts: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Give every (token, choice) a slot of its expert, in token order, while there are any.

    experts [tokens, top_k] int64. Expert e owns slots e * capacity to (e + 1) * capacity - 1.
    Returns slot_of_choice [tokens, top_k], num_experts * capacity where the expert was full,
    and token_of_slot [num_experts * capacity], `tokens` where the slot stayed empty.
    """
    tokens, top_k = experts.shape
    choices = experts.flatten()
    order = choices.argsort(stable=True)
    expert = choices[order]
    counts = torch.bincount(choices, minlength=num_experts)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(choices)) - first[expert]
    overflow = num_experts * capacity
    slot = torch.where(rank < capacity, expert * capacity + rank, overflow)

    slot_of_choice = torch.empty_like(choices)
    slot_of_choice[order] = slot
    token_of_slot = torch.full((overflow + 1,), tokens)
    token_of_slot[slot] = order // top_k
    return slot_of_choice.view(tokens, top_k), token_of_slot[:overflow]


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoe(config)

    def forward(self, x: Tensor, rotary: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        mixed, balance_loss = self.mlp(self.post_attention_layernorm(x))
        return x + mixed, balance_loss


class DemoModel(nn.Module):
    """The whole model; input and output share one embedding."""

    def __init__(self, config: ModelConfig, positions: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, positions)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # What feeds the residual stream starts small, the deeper the model the smaller.
        residual_std = config.hidden_size**-0.5 / math.sqrt(2 * config.num_hidden_layers)
        for layer in self.layers:
            nn.init.normal_(layer.self_attn.o_proj.weight, std=residual_std)

    def forward(self, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at some positions, and the layers' mean load-balancing loss.

        tokens [batch, length] int64; wanted [n] int64 are positions in tokens.flatten().
        Returns logits [n, vocab_size] and a scalar.
        """
        hidden = self.embed_tokens(tokens).to(COMPUTE_DTYPE)
        balance_losses = []
        for layer in self.layers:
            hidden, balance_loss = layer(hidden, self.rotary)
            balance_losses.append(balance_loss)
        hidden = self.norm(hidden).flatten(0, 1)[wanted]
        logits = hidden @ self.embed_tokens.weight.t().to(hidden.dtype)
        return logits, sum(balance_losses) / len(balance_losses)
