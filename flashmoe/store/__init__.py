"""The on-disk format and nothing else: layout, manifest, writer, reader, verify.

Knows no MLX model and no checkpoint; only this package knows offsets inside a store.
"""
