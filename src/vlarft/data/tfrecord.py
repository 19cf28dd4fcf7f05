"""Read TFRecord files and the tf.train.Example messages in them, without TensorFlow.

A record is: length (uint64, little endian), masked CRC-32C of those 8 bytes (uint32), the data, masked CRC-32C of the
data (uint32). An Example is protobuf: Example{1: Features{1: map of string to Feature{1: BytesList, 2: FloatList,
3: Int64List}}}, each list a repeated field 1.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlarft.data.frames import map_file
from vlarft.run.lfs import refuse_pointer

POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reversed
LANE = 4096  # bytes per lane of the vectorised checksum


class Blobs(NamedTuple):
    """Byte strings in a file: the first byte and the length of each."""

    offsets: np.ndarray
    sizes: np.ndarray


Feature = Blobs | np.ndarray  # bytes, float32 or int64


@functools.cache
def _table() -> np.ndarray:
    """Return (65536,) uint32: what each value of a register's low 16 bits becomes when these are shifted out."""
    register = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        register = (register >> 1) ^ np.where(register & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return register


@functools.cache
def _zeros(doublings: int) -> np.ndarray:
    """Return (32,) uint32: what LANE * 2 ** doublings zero bytes turn each bit of the register into."""
    if doublings:
        half = _zeros(doublings - 1)
        return _shift(half, half)
    register = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(LANE // 2):
        register = _table()[register & 0xFFFF] ^ (register >> 16)
    return register


def _shift(operator: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """Apply `_zeros` to registers (N,): shifting is linear over XOR, so the result is the XOR over their set bits."""
    out = np.zeros_like(registers)
    for bit in range(32):
        out ^= np.where((registers >> np.uint32(bit)) & 1, operator[bit], np.uint32(0))
    return out


def crc32c(data: np.ndarray) -> int:
    """Compute the CRC-32C of (N,) uint8.

    The data is cut into lanes that are processed in parallel. Neighbours are then merged pairwise: the left register,
    shifted by as many zero bytes as the right lane is long, XOR the right one. A zero register ignores leading zeros,
    so the first lane is padded in front. Starting from ones is the same as inverting the first four bytes.
    """
    if len(data) < 4:
        register = 0xFFFFFFFF
        for byte in data.tolist():
            register ^= byte
            for _ in range(8):
                register = (register >> 1) ^ (POLYNOMIAL if register & 1 else 0)
        return register ^ 0xFFFFFFFF
    lanes = -(-len(data) // LANE)
    padded = np.zeros(lanes * LANE, np.uint8)
    padded[-len(data) :] = data
    padded[len(padded) - len(data) :][:4] ^= 0xFF
    words = np.ascontiguousarray(padded.view("<u2").reshape(lanes, LANE // 2).T)
    registers, table = np.zeros(lanes, np.uint32), _table()
    for column in words:
        registers = table.take(registers.astype(np.uint16) ^ column) ^ (registers >> 16)
    doublings = 0
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, np.uint32), registers])
        registers = _shift(_zeros(doublings), registers[::2]) ^ registers[1::2]
        doublings += 1
    return int(registers[0]) ^ 0xFFFFFFFF


def masked_crc(data: np.ndarray) -> int:
    """Compute the checksum as TFRecord files store it: rotated right by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the records of a file as (the file's mapped bytes up to the record's end, offset of the record in them).

    Raises:
        ValueError: truncated file, or a wrong checksum.
    """
    refuse_pointer(path)
    content, at, number = map_file(path), 0, 0
    if content[:2].tobytes() == b"\x1f\x8b":
        raise ValueError(f"{path} is compressed with gzip: decompress it (gunzip < FILE > COPY), keeping its name")
    while at < len(content):
        head = content[at : at + 12]
        if len(head) < 12:
            raise ValueError(f"{path} is truncated in the header of record {number}; copy it again")
        length = int(head[:8].view("<u8")[0])
        if masked_crc(head[:8]) != int(head[8:].view("<u4")[0]):
            raise ValueError(
                f"{path}: the length of record {number} has a wrong checksum; the file is damaged or not TFRecord"
            )
        end = at + 12 + length
        if end + 4 > len(content):
            raise ValueError(
                f"{path} is truncated in record {number} ({len(content)} bytes, {end + 4} needed); copy it again"
            )
        if masked_crc(content[at + 12 : end]) != int(content[end : end + 4].copy().view("<u4")[0]):
            raise ValueError(f"{path}: record {number} has a wrong checksum; the file is damaged: copy it again")
        yield content[:end], at + 12
        at, number = end + 4, number + 1


def parse_example(content: np.ndarray, at: int) -> dict[str, Feature]:
    """Parse the tf.train.Example content[at:] into name -> feature.

    Args:
        content: (N,) uint8; the offsets of byte strings are positions in it.
        at: first byte of the message.

    Raises:
        ValueError: not such a message.
    """
    out: dict[str, Feature] = {}
    try:
        for _, start, end in _fields(content, at, len(content), {1}):
            for _, entry, entry_end in _fields(content, start, end, {1}):
                parts = {number: (a, b) for number, a, b in _fields(content, entry, entry_end, {1, 2})}
                a, b = parts[1]
                name = content[a:b].tobytes().decode()
                out[name] = _feature(content, *parts[2]) if 2 in parts else np.zeros(0, np.float32)
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"not a tf.train.Example ({type(error).__name__}: {error})") from error
    return out


def _feature(content: np.ndarray, start: int, end: int) -> Feature:
    for kind, a, b in _fields(content, start, end, {1, 2, 3}):
        if kind == 1:
            places = [(x, y - x) for _, x, y in _fields(content, a, b, {1})]
            return Blobs(*np.array(places, np.int64).reshape(-1, 2).T)
        spans = list(_fields(content, a, b, {1}))  # packed: one span; else one per value
        if kind == 2:
            return np.concatenate([content[x:y] for _, x, y in spans] or [np.zeros(0, np.uint8)]).view("<f4")
        values = []
        for _, x, y in spans:
            while x < y:
                value, x = _varint(content, x)
                values.append(value - (1 << 64) * (value >> 63))
        return np.array(values, np.int64)
    return np.zeros(0, np.float32)  # a feature without a list


def _varint(content: np.ndarray, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = int(content[at])
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def _fields(content: np.ndarray, at: int, end: int, wanted: set[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, first byte, end) of the value of each wanted field of a message."""
    while at < end:
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            size, at = _varint(content, at)
        elif wire == 0:
            size = _varint(content, at)[1] - at
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise IndexError(f"wire type {wire} at byte {at}")
        if at + size > end:
            raise IndexError(f"field {number} at byte {at} is {size} bytes long, {end - at} are left")
        if number in wanted:
            yield number, at, at + size
        at += size
