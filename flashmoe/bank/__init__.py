"""Records in memory: slots, which record is in which, reading them in, who gives way.

Only this package knows slots. It knows no model and no tokens.
"""
