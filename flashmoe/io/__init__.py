"""Moving byte ranges from files into writable buffers, concurrently.

Knows no experts and no models. Nothing else in the package reads record bytes.
"""
