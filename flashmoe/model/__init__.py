"""mlx-lm models with their routed experts replaced by streamed ones."""
