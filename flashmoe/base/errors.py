"""Every error this package raises on purpose.

FlashMoEError
├── SourceError         a checkpoint or trace cannot be found, read or understood
├── StoreError          a store is missing, incomplete, damaged or of another version
├── StoreInUseError     another process runs this store (carries its pid)
├── ReadError           bytes of an open file could not be read (carries path, offset, errno)
│   └── ReadCancelled   a read was dropped before it began
├── MemoryBudgetError   what was asked for does not fit (carries the least that would)
├── PromptError         a prompt cannot be encoded or does not fit the context
└── OptionError         an argument is out of range or contradicts another one
"""

from __future__ import annotations


class FlashMoEError(Exception):
    """Root of the tree; its text is one sentence meant for the user."""


class SourceError(FlashMoEError):
    """A checkpoint or trace cannot be found, read or understood."""


class StoreError(FlashMoEError):
    """A store is missing, incomplete, damaged or written by another version."""


class StoreInUseError(FlashMoEError):
    """Another process runs this store; `pid` is which."""

    def __init__(self, path: str, pid: int) -> None:
        super().__init__(
            f"{path} is in use by process {pid}; wait for it to end, or give --share "
            "(share=True in Python) to run both"
        )
        self.pid = pid


class ReadError(FlashMoEError):
    """Bytes of an open file could not be read.

    Attributes: `path` (str), `offset` (bytes from the start of the file),
    `errno` (int, or None when the file simply ended).
    """

    def __init__(self, path: str, offset: int, reason: str, errno: int | None = None) -> None:
        super().__init__(f"cannot read {path} at offset {offset}: {reason}")
        self.path = path
        self.offset = offset
        self.errno = errno


class ReadCancelled(ReadError):
    """A read was dropped before it began; its buffers hold what they held."""

    def __init__(self, path: str, offset: int) -> None:
        super().__init__(path, offset, "the read was cancelled before it began")


class MemoryBudgetError(FlashMoEError):
    """What was asked for does not fit; `least_bytes` is the smallest number that would."""

    def __init__(self, message: str, least_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class PromptError(FlashMoEError):
    """A prompt cannot be encoded or does not fit the context."""


class OptionError(FlashMoEError):
    """An argument is out of range or contradicts another one."""
