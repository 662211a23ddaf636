"""How the weights of a float checkpoint are packed, decided module by module, lazily."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from flashmoe.checkpoint.architecture import PROJECTION_TYPES, expert_modules, projections_of
from flashmoe.errors import OptionError
from flashmoe.store.layout import Quantization

BITS = (2, 3, 4, 5, 6, 8, 16, 32)
GROUP_SIZES = (32, 64, 128)
DEFAULT_BITS = 4
DEFAULT_GROUP_SIZE = 64


@dataclass(frozen=True)
class Precision:
    """Bits of the experts and of everything resident; 16 and 32 keep floats.

    16 rounds float32 tensors to bfloat16; 32 leaves every tensor as the source has it.
    """

    bits: int = DEFAULT_BITS
    group_size: int = DEFAULT_GROUP_SIZE
    resident_bits: int = DEFAULT_BITS

    @classmethod
    def from_options(
        cls, bits: int | None, group_size: int | None, resident_bits: int | None
    ) -> Precision:
        """Fill in the defaults: 4 bits, groups of 64, resident weights as the experts.

        Raises OptionError for a value outside BITS or GROUP_SIZES.
        """
        bits = DEFAULT_BITS if bits is None else bits
        group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
        resident_bits = bits if resident_bits is None else resident_bits
        for name, value, allowed in (
            ("bits", bits, BITS),
            ("group size", group_size, GROUP_SIZES),
            ("resident bits", resident_bits, BITS),
        ):
            if value not in allowed:
                raise OptionError(f"{name} must be one of {list(allowed)}, not {value}")
        return cls(bits, group_size, resident_bits)


def quantize_lazily(model: nn.Module, precision: Precision) -> nn.Module:
    """Put quantized modules in where `precision` asks for them; nothing is evaluated yet.

    What the family's own quant_predicate protects (routers and the like) stays protected.
    Raises OptionError when an expert projection's width is no multiple of the group size.
    """
    if 16 in (precision.bits, precision.resident_bits):
        _round_to_16_bits(model, precision)
    if precision.bits >= 16 and precision.resident_bits >= 16:
        return model
    experts = expert_modules(model)
    if precision.bits < 16:
        _check_group_size(experts, precision.group_size)
    family_predicate = getattr(model, "quant_predicate", None)

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        streamed = isinstance(module, PROJECTION_TYPES) and _is_inside(path, experts)
        bits = precision.bits if streamed else precision.resident_bits
        if bits >= 16 or not hasattr(module, "to_quantized"):
            return False
        # As mlx-lm converts: what the default groups do not divide stays in floats.
        if module["weight"].shape[-1] % precision.group_size:
            return False
        wanted = family_predicate(path, module) if family_predicate is not None else True
        if wanted is True:
            return {"bits": bits, "group_size": precision.group_size}
        return wanted or False

    nn.quantize(model, class_predicate=predicate)
    return model


def pack(rows: mx.array, packing: Quantization) -> list[mx.array]:
    """The parts of some rows `[..., d_in]` of a weight, packed: weight, scales and, where the mode
    has them, biases. The rows of a whole weight give the rows of the whole's parts."""
    parts = mx.quantize(rows, group_size=packing.group_size, bits=packing.bits, mode=packing.mode)
    return list(parts)


def _is_inside(path: str, modules: dict[str, nn.Module]) -> bool:
    return path.rpartition(".")[0] in modules


def _check_group_size(experts: dict[str, nn.Module], group_size: int) -> None:
    for path, module in experts.items():
        for name, projection in projections_of(module).items():
            width = projection["weight"].shape[-1]
            if width % group_size:
                raise OptionError(
                    f"{path}.{name} has {width} inputs per row, no multiple of group size "
                    f"{group_size}; choose another --group-size or --bits 16"
                )


def _round_to_16_bits(model: nn.Module, precision: Precision) -> None:
    keep: Callable[[str], bool] = getattr(model, "cast_predicate", lambda name: True)
    experts = expert_modules(model)

    def rounded(name: str, array: Any) -> Any:
        streamed = _is_inside(name.rpartition(".")[0], experts)
        bits = precision.bits if streamed else precision.resident_bits
        if bits == 16 and array.dtype == mx.float32 and keep(name):
            return array.astype(mx.bfloat16)
        return array

    model.update(tree_map_with_path(rounded, model.parameters()))
