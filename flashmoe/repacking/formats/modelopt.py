"""What NVIDIA's ModelOpt writes: 8-bit floats, or NVFP4, which mlx-lm reads itself."""

from __future__ import annotations

from flashmoe.errors import SourceError
from flashmoe.repacking.formats import fp8
from flashmoe.repacking.formats.contract import AS_IT_IS, Format, Packed, Presentation


def present(packed: Packed) -> Presentation:
    """By the algorithm, which a file of its own nests."""
    settings = packed.settings.get("quantization", packed.settings)
    algorithm = settings.get("quant_algo") if isinstance(settings, dict) else None
    if algorithm == "NVFP4":
        return AS_IT_IS
    if algorithm == "FP8":
        return fp8.present(packed)
    raise SourceError(
        f"{packed.where} is packed as modelopt's {algorithm}, which flashmoe does not read; of "
        "modelopt it reads FP8 and NVFP4"
    )


MODELOPT = Format("FP8 and NVFP4 of ModelOpt", ("modelopt",), present)
