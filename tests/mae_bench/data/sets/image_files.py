"""Write image files byte by byte or without loss, of pixels (H, W) or (H, W, C)."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 10, 12  # of all images


def save(image: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def save_array(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encode_png(rows: np.ndarray, num_bits: int, colour: int, *chunks: bytes, width: int = WIDTH) -> bytes:
    """Return a PNG of rows of bytes, (H, bytes); colour: 0 grey, 2 RGB, 3 palette, 4 and 6 with alpha."""
    header = struct.pack(">IIBBBBB", width, len(rows), num_bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    pixels = [make_chunk(b"IDAT", zlib.compress(lines)), make_chunk(b"IEND", b"")]
    return b"".join([b"\x89PNG\r\n\x1a\n", make_chunk(b"IHDR", header), *chunks, *pixels])


def make_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pack_bits(values: np.ndarray, num_bits: int) -> np.ndarray:
    """Return the lowest bits of values (H, W, 1), packed to bytes, (H, bytes)."""
    bits = np.unpackbits(values, axis=2)[..., 8 - num_bits :]
    return np.packbits(bits.reshape(len(values), -1), axis=1)


def encode_tiff(
    data: bytes,
    num_bits: int,
    photometric: int,
    channels: int = 1,
    kind: int = 1,
    order: str = "<",
) -> bytes:
    """Return an uncompressed TIFF; photometric: 0 white is 0, 1 grey, 2 RGB, 5 CMYK; kind: SampleFormat."""
    entries = {256: [WIDTH], 257: [HEIGHT], 258: [num_bits] * channels, 259: [1], 262: [photometric]}
    entries |= {273: [8], 277: [channels], 278: [HEIGHT], 279: [len(data)], 339: [kind] * channels}
    end = 8 + len(data)
    fields, tail = [], b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            place = end + 2 + 12 * len(entries) + 4 + len(tail)
            packed, tail = struct.pack(f"{order}I", place), tail + packed
        fields.append(struct.pack(f"{order}HHI", tag, 3, len(values)) + packed.ljust(4, b"\0"))
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", end)
    count = struct.pack(f"{order}H", len(entries))
    return start + data + count + b"".join(fields) + bytes(4) + tail


def pack_12_bits(values: np.ndarray) -> bytes:
    """Return pairs of values below 4096 as three bytes each."""
    first, second = values.reshape(-1, 2).astype(np.uint16).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def turn(image: np.ndarray, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(image, form, exif=exif, quality=100)


def states_shape(shape: tuple[int, ...]) -> bytes:
    """Return a .npy file whose header states a shape and whose values are few."""
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(300)
