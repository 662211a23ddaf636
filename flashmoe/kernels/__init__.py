"""One function, several implementations: routed experts over a bank.

Only this package knows how weights are packed.
"""
