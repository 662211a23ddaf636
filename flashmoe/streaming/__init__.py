"""The modules that stand in for mlx-lm's experts: one token, and prefill.

Knows banks and kernels; knows no files and no budget.
"""
