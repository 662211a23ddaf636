"""What NVIDIA's ModelOpt writes: 8-bit floats with a scale per tensor, or nvfp4."""

from __future__ import annotations

import mlx.core as mx

from flashmoe.base.errors import SourceError
from flashmoe.repacking.formats import fp8, nvfp4
from flashmoe.repacking.formats.affine import paths_of
from flashmoe.repacking.formats.contract import Format, Packed, Presentation

PARTS = (".weight_scale", ".weight_scale_2", ".input_scale")


def present(packed: Packed) -> Presentation:
    """Every packed weight as floats of the checkpoint's dtype.

    The algorithm stands in a table of its own in ModelOpt's own file; a layer that has a second
    scale is nvfp4.
    """
    settings = packed.settings.get("quantization", packed.settings)
    algorithm = settings.get("quant_algo") if isinstance(settings, dict) else None
    if algorithm not in ("FP8", "NVFP4", "MIXED_PRECISION"):
        raise SourceError(
            f"{packed.where} is packed as modelopt's {algorithm}, which flashmoe does not read; of "
            "modelopt it reads FP8 and NVFP4"
        )
    floats = fp8.present(packed)
    stand_ins, hidden = dict(floats.stand_ins), set(floats.hidden)
    for path in paths_of(packed.tensors, ".weight_scale_2"):
        weight = f"{path}.weight"
        names = (weight, f"{weight}_scale", f"{weight}_scale_2")
        stand_ins[weight] = nvfp4.floats_of(packed, names, mx.multiply)
        hidden |= {path + part for part in PARTS}
    return Presentation(stand_ins, frozenset(hidden))


MODELOPT = Format("FP8 and NVFP4 of ModelOpt", ("modelopt",), present)
