"""The CRC-32s of a store's tensors and records, out of those of the pieces that made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flashmoe.repacking.digest import combine_crc32
from flashmoe.repacking.schedule import Schedule, Sink


@dataclass
class _File:
    """CRC-32s by part; a tensor has one for each stretch of rows, in any order."""

    parts: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)


def checksums(schedule: Schedule, crcs: memoryview, late: Mapping[int, bytes]) -> list[str]:
    """8 hex digits per part for each file of the store.

    `crcs` has 4 bytes for each stretch in the order of the pieces, `late` those of parameters
    that were written whole.
    """
    files = [_File() for _ in schedule.files]

    def note(sink: Sink, begin: int, end: int, content: memoryview) -> memoryview:
        """Take a sink's CRC-32s off the front."""
        stretches = (
            [(row, row + 1, sink.part + row * sink.part_step) for row in range(begin, end)]
            if sink.part_step
            else [(begin, end, sink.part)]
        )
        for first, last, part in stretches:
            crc = int.from_bytes(content[:4], "big")
            content = content[4:]
            n_bytes = (last - first) * sink.row_bytes
            files[sink.file].parts.setdefault(part, []).append((first, n_bytes, crc))
        return content

    rest = crcs
    for piece in schedule.pieces:
        for sink in schedule.parameters[piece.parameter].sinks:
            rest = note(sink, piece.begin, piece.end, rest)
    for index, own in late.items():
        parameter, rest = schedule.parameters[index], memoryview(own)
        for sink in parameter.sinks:
            rest = note(sink, 0, parameter.n_rows, rest)
    return [
        "".join(f"{_joined(found.parts.get(part, [])):08x}" for part in range(file.n_parts))
        for file, found in zip(schedule.files, files, strict=True)
    ]


def _joined(stretches: list[tuple[int, int, int]]) -> int:
    crcs = [(n_bytes, crc) for _, n_bytes, crc in sorted(stretches)]
    total = crcs[0][1] if crcs else 0
    for n_bytes, crc in crcs[1:]:
        total = combine_crc32(total, crc, n_bytes)
    return total
