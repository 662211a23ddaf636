"""What the config functions of the golden vectors share.

Each config keeps what sets its family apart (kinds of layers, routing, biases, rotary embedding)
at dimensions that make a checkpoint of about half a megabyte. Values that transformers or mlx-lm
would also assume by default are avoided where possible, so that a field that is not read shows.
Dimensions that a quantized weight is grouped along are multiples of 32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import transformers
from transformers import PreTrainedConfig

VOCAB_SIZE = 128

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    # No token is special: prompt and greedy tokens are plain ids, there is no tokenizer.
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Heads of a family whose hidden size is 64, for attention without other features.
GROUPED_QUERY = {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """One architecture: its tiny config, and `stds` of weights by name suffix where the default
    scale would leave a feature untouched.

    `original_format` is passed to `save_pretrained`: true writes one tensor per expert where
    transformers has such a mapping, false writes its own stacked experts.
    """

    config: Callable[[], PreTrainedConfig]
    auto_class: type = transformers.AutoModelForCausalLM
    stds: Mapping[str, float] = field(default_factory=dict)
    original_format: bool = True


def default_rope(theta: float, **extra: object) -> dict[str, object]:
    """Return transformers 5's `rope_parameters` for unscaled rotary embeddings."""
    return {"rope_type": "default", "rope_theta": theta, **extra}
