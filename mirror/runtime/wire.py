"""Reads fields of protocol buffers, the format of ONNX files, without a library that knows ONNX."""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield every field's number and value: bytes of what has a length, numbers as they are, others left out."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            length, place = _varint(data, place)
            yield number, data[place : place + length]
            place += length
        elif kind == _VARINT:
            value, place = _varint(data, place)
            yield number, value
        else:
            place += {_FIXED64: 8, _FIXED32: 4}[kind]


def messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """Yield the contents of every length-delimited field with this number."""
    for number, value in fields(data):
        if number == wanted and isinstance(value, memoryview):
            yield value


def numbers(data: memoryview, wanted: int) -> Iterator[int]:
    """Yield every whole number of a field with this number, packed ones too; none is expected below zero."""
    for number, value in fields(data):
        if number != wanted:
            continue
        if isinstance(value, int):
            yield value
            continue
        place = 0
        while place < len(value):
            item, place = _varint(value, place)
            yield item


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return the number that begins at a place, seven bits to a byte, and the place after it."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, place
