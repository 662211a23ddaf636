"""What every room may use: errors, units, dtypes, the clock, the machine's own facts.

Knows no model and no store.
"""
