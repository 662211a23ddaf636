"""The bundled demo model: an MLX checkpoint that mlx-lm loads too."""

from pathlib import Path

DEMO_FOLDER = Path(__file__).parent
