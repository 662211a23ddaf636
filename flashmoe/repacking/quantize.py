"""How the weights of a float checkpoint are packed, decided module by module, lazily."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from flashmoe.base.errors import OptionError
from flashmoe.repacking import hqq
from flashmoe.repacking.model_parts import Parts, layer_of
from flashmoe.repacking.recipe import Recipe, Setting

Settings = Mapping[str, Setting]
PACKED = ("weight", "scales", "biases")


class Tensors:
    """A model's tensors by name, each evaluated by whoever takes it.

    What mx.quantize packs is lazy already. Weights with another method are packed when the first
    of their tensors is taken: `packed_later` has their floats and settings by module path.
    """

    def __init__(
        self, model: nn.Module, packed_later: Mapping[str, tuple[mx.array, Setting]]
    ) -> None:
        self._arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        self._later = dict(packed_later)

    def pop(self, name: str) -> mx.array:
        """Take a tensor out; KeyError when it is not, or no longer, there."""
        path, _, part = name.rpartition(".")
        if path in self._later and part in PACKED:
            weight, setting = self._later.pop(path)
            for field, array in pack(weight, setting).items():
                self._arrays[f"{path}.{field}"] = array
        return self._arrays.pop(name)


def pack(weight: mx.array, setting: Setting) -> dict[str, mx.array]:
    """A weight [..., width] as the tensors that MLX multiplies with: `weight`, `scales` and, in
    mode affine, `biases`. Rows are packed alike whatever is packed with them."""
    if setting.method == "hqq":
        parts = hqq.quantize(weight, setting.group_size, setting.bits)
    else:
        parts = mx.quantize(
            weight, group_size=setting.group_size, bits=setting.bits, mode=setting.mode
        )
    return dict(zip(PACKED, parts, strict=False))


def settle(model: nn.Module, recipe: Recipe) -> Settings:
    """What `recipe` says about each module that has parameters, by path.

    What the family's own quant_predicate protects (routers and the like) stays protected, and
    rows that groups do not divide stay floats, as mlx-lm converts them. Raises OptionError for
    an expert projection whose rows they do not divide.
    """
    parts = Parts(model)
    family_predicate: Callable[[str, nn.Module], Any] = getattr(model, "quant_predicate", None) or (
        lambda path, module: True
    )
    modules = dict(model.named_modules())
    for path in parts.experts:
        _check_group_size(path, modules[path], recipe.setting(parts.of(path), layer_of(path)))
    settings = {}
    for path, module in modules.items():
        setting = recipe.setting(parts.of(path), layer_of(path))
        if not setting.is_float:
            setting = _packed(path, module, setting, family_predicate)
        settings[path] = setting
    return settings


def quantize_lazily(model: nn.Module, settings: Settings) -> Tensors:
    """Put quantized modules in where `settings` ask for them; nothing is evaluated yet.

    Returns the model's tensors. The modules of weights that mx.quantize does not pack have
    its tensors' shapes, and must not be evaluated.
    """
    if any(setting.bits == 16 for setting in settings.values()):
        _round_to_16_bits(model, settings)
    packed_later: dict[str, tuple[mx.array, Setting]] = {}

    def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
        setting = settings.get(path)
        if setting is None or setting.is_float or not hasattr(module, "to_quantized"):
            return False
        if setting.method != "rtn":
            packed_later[path] = (module["weight"], setting)
        return {"bits": setting.bits, "group_size": setting.group_size, "mode": setting.mode}

    nn.quantize(model, class_predicate=packing)
    return Tensors(model, packed_later)


def _packed(
    path: str, module: nn.Module, setting: Setting, family_predicate: Callable[..., Any]
) -> Setting:
    """A setting for packed weights as far as the module and its family go along with it."""
    as_it_is = Setting(bits=32)
    if not hasattr(module, "to_quantized") or module["weight"].shape[-1] % setting.group_size:
        return as_it_is
    wanted = family_predicate(path, module)
    if isinstance(wanted, dict):
        own = Setting(**{"method": setting.method, **wanted})
        # The family's precision, in groups that divide the rows.
        divides = module["weight"].shape[-1] % own.group_size == 0
        return own if divides else replace(own, group_size=setting.group_size)
    return setting if wanted else as_it_is


def _check_group_size(path: str, module: nn.Module, setting: Setting) -> None:
    width = module["weight"].shape[-1]
    if not setting.is_float and width % setting.group_size:
        raise OptionError(
            f"{path} has {width} inputs per row, no multiple of group size "
            f"{setting.group_size}; choose another --group-size or --bits 16"
        )


def _round_to_16_bits(model: nn.Module, settings: Settings) -> None:
    keep: Callable[[str], bool] = getattr(model, "cast_predicate", lambda name: True)

    def rounded(name: str, array: Any) -> Any:
        setting = settings.get(name.rpartition(".")[0])
        wanted = setting is not None and setting.bits == 16
        if wanted and array.dtype == mx.float32 and keep(name):
            return array.astype(mx.bfloat16)
        return array

    model.update(tree_map_with_path(rounded, model.parameters()))
