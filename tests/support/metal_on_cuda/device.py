"""Requests on the GPU, through the library that `build` made."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from tests.support.metal_on_cuda.requests import Request

Slots = npt.NDArray[np.int32]

# Not a number in every dtype of an output.
_POISON = 0xFF
_BANK = ("_weight", "_scales", "_biases", "_bias")


class DeviceError(Exception):
    """What CUDA said."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, measured again and again; outputs of the first and the last call."""

    seconds: list[float]
    first: mx.array
    last: mx.array


class CudaDevice:
    """The first GPU. Raises DeviceError, also when there is none."""

    def __init__(self, library: Path, name_of: Callable[[Request], str]) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.error_text.restype = ctypes.c_char_p
        self._name_of = name_of
        count = ctypes.c_int()
        self._call("device_count", ctypes.byref(count))
        if not count.value:
            raise DeviceError("CUDA sees no device")
        text = ctypes.create_string_buffer(256)
        self._call("device_name", text, ctypes.c_size_t(255))
        self.name = text.value.decode()

    def run(self, request: Request) -> mx.array:
        """The output of one call."""
        with self._buffers(request, copies=1) as buffers:
            self._launch(request, buffers)
            return self._output(request, buffers[-1])

    def time(self, request: Request, slots: Slots, copies: int, repeats: int) -> Timing:
        """Calls one after the other, call c with slots[c] [n_pairs], over a bank of `copies`
        times the request's."""
        calls = len(slots)
        with self._buffers(request, copies) as buffers, self._upload(slots.tobytes()) as routing:
            place = request.kernel.inputs.index("slots")
            rows = [list(buffers) for _ in range(calls)]
            for call, row in enumerate(rows):
                row[place] = routing + call * slots[0].nbytes
            self._launch(request, rows[0])
            first = self._output(request, buffers[-1])
            self._call("fill", _pointer(buffers[-1]), _POISON, _size(self._output_bytes(request)))
            every = (ctypes.c_void_p * (calls * len(buffers)))(*(a for row in rows for a in row))
            milliseconds = (ctypes.c_float * repeats)()
            self._call(
                "time_launches",
                *(*self._shape(request), every, len(buffers), calls, repeats, milliseconds),
            )
            last = self._output(request, buffers[-1])
        return Timing([m / 1e3 / calls for m in milliseconds], first, last)

    def copy_seconds(self, bytes_: int, calls: int, repeats: int) -> list[float]:
        """Seconds of copying so many bytes to elsewhere on the device."""
        milliseconds = (ctypes.c_float * repeats)()
        with self._allocated(bytes_ * calls) as source, self._allocated(bytes_ * calls) as target:
            for address in (source, target):
                self._call("fill", _pointer(address), 0, _size(bytes_ * calls))
            places = _pointer(target), _pointer(source)
            self._call("time_copies", *places, _size(bytes_), calls, repeats, milliseconds)
        return [m / 1e3 / calls for m in milliseconds]

    @contextmanager
    def _buffers(self, request: Request, copies: int) -> Iterator[list[int]]:
        """Addresses of the inputs and the poisoned output; an array that stands in for another
        is there once."""
        held: dict[int, int] = {}
        with ExitStack() as stack:
            for name, array in zip(request.kernel.inputs, request.inputs, strict=True):
                if id(array) not in held:
                    times = copies if name.endswith(_BANK) else 1
                    held[id(array)] = stack.enter_context(self._upload(_bytes(array), times))
            size = self._output_bytes(request)
            output = stack.enter_context(self._allocated(size))
            self._call("fill", _pointer(output), _POISON, _size(size))
            yield [*(held[id(array)] for array in request.inputs), output]

    @contextmanager
    def _upload(self, content: bytes, times: int = 1) -> Iterator[int]:
        with self._allocated(len(content) * times) as address:
            for i in range(times):
                place = _pointer(address + i * len(content))
                self._call("copy", place, content, _size(len(content)))
            yield address

    @contextmanager
    def _allocated(self, bytes_: int) -> Iterator[int]:
        address = ctypes.c_void_p()
        self._call("allocate", ctypes.byref(address), _size(bytes_))
        try:
            yield address.value or 0
        finally:
            self._call("release", address)

    def _launch(self, request: Request, buffers: list[int]) -> None:
        addresses = (ctypes.c_void_p * len(buffers))(*buffers)
        self._call("launch", *self._shape(request), addresses, len(buffers))

    def _shape(self, request: Request) -> tuple[object, ...]:
        """The kernel, its groups and the threads of one, as `launch` takes them."""
        address = getattr(self._library, f"address_of_{self._name_of(request)}")
        address.restype = ctypes.c_void_p
        counts = list(zip(request.grid, request.threadgroup, strict=True))
        assert not any(threads % group for threads, group in counts), "the last group is not full"
        triple = ctypes.c_uint * 3
        groups = triple(*(threads // group for threads, group in counts))
        return _pointer(address()), groups, triple(*request.threadgroup)

    @staticmethod
    def _output_bytes(request: Request) -> int:
        return int(np.prod(request.output_shape)) * request.output_dtype.size

    def _output(self, request: Request, address: int) -> mx.array:
        content = np.empty(self._output_bytes(request), np.uint8)
        target = content.ctypes.data_as(ctypes.c_void_p)
        self._call("copy", target, _pointer(address), _size(content.nbytes))
        return mx.array(content).view(request.output_dtype).reshape(request.output_shape)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            text = self._library.error_text(status).decode()
            raise DeviceError(f"{text} (CUDA error {status} from {function})")


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _size(bytes_: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(bytes_)


def _bytes(array: mx.array) -> bytes:
    return np.asarray(array.reshape(-1).view(mx.uint8)).tobytes()
