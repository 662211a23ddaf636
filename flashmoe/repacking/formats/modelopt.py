"""What NVIDIA's ModelOpt writes: 8-bit floats with a scale per tensor."""

from __future__ import annotations

from flashmoe.errors import SourceError
from flashmoe.repacking.formats import fp8
from flashmoe.repacking.formats.contract import Format, Packed, Presentation


def present(packed: Packed) -> Presentation:
    """By the algorithm, which a file of its own nests."""
    settings = packed.settings.get("quantization", packed.settings)
    algorithm = settings.get("quant_algo") if isinstance(settings, dict) else None
    if algorithm == "FP8":
        return fp8.present(packed)
    raise SourceError(
        f"{packed.where} is packed as modelopt's {algorithm}, which flashmoe does not read; of "
        "modelopt it reads FP8"
    )


MODELOPT = Format("FP8 of ModelOpt", ("modelopt",), present)
