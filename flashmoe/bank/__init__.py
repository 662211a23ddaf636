"""Records in memory: slots, which expert is in which, reading them in, who gives way.

Knows records and experts by number; knows no model and no tokens.
"""
