"""Which part of a model each of its modules is, as recipes name them."""

from __future__ import annotations

import mlx.nn as nn

from flashmoe.checkpoint.architecture import expert_modules, projections_of

# What stands where attention would, by mlx-lm's names of modules or of their classes.
MIXERS = ("attn", "attention", "mamba", "deltanet", "conv")
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
LINEARS = (nn.Linear, nn.QuantizedLinear)
PROJECTION_PARTS = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "fc1": "up",
    "fc2": "down",
}


class Parts:
    """The parts of one model: experts and embeddings by type, the head by its rows, attention by
    the names that mlx-lm gives it."""

    def __init__(self, model: nn.Module) -> None:
        self.experts = {
            f"{path}.{name}": PROJECTION_PARTS[name]
            for path, module in expert_modules(model).items()
            for name in projections_of(module)
        }
        modules = dict(model.named_modules())
        self._classes = {path: type(module).__name__.lower() for path, module in modules.items()}
        self._embeddings = {p for p, m in modules.items() if isinstance(m, EMBEDDINGS)}
        vocabularies = {modules[path]["weight"].shape[0] for path in self._embeddings}
        self._heads = {
            path
            for path, module in modules.items()
            if isinstance(module, LINEARS)
            and layer_of(path) is None
            and module["weight"].shape[0] in vocabularies
        }

    def of(self, path: str) -> str:
        """The part that the module at `path` belongs to, a key of `recipe.PARTS`."""
        if path in self.experts:
            return self.experts[path]
        if path in self._embeddings:
            return "embeddings"
        if path in self._heads:
            return "head"
        return "attention" if self._is_mixer(path) else "resident"

    def _is_mixer(self, path: str) -> bool:
        if layer_of(path) is None:
            return False
        names = path.split(".")
        depth = next(i for i, name in enumerate(names) if name.isdigit()) + 1
        for end in range(depth + 1, len(names) + 1):
            words = f"{names[end - 1].lower()} {self._classes.get('.'.join(names[:end]), '')}"
            # Norms before or after attention are named after it, and are none of it.
            if "norm" not in words and any(mixer in words for mixer in MIXERS):
                return True
        return False


def layer_of(path: str) -> int | None:
    """The number of the decoder layer that a module lies in, None outside of them."""
    return next((int(name) for name in path.split(".") if name.isdigit()), None)
