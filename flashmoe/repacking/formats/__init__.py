"""How other packages pack weights. Each format says which tensors mlx-lm is to see in place of
the checkpoint's, and how their rows follow from rows of these. Knows no files, no stores."""
