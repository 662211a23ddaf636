"""What Hugging Face gives us: files, configs, and the mlx-lm model that a config describes.

Knows no store and no streaming; both wings ask it the same questions.
"""
