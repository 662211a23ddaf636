"""Online: records move from disk into slots, and kernels run over them.

Only this package knows slots.
"""
