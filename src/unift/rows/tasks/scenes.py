"""Procedural pictures of the task jigsaw: landscapes, single shapes, tiles, and a PNG that has the same bytes everywhere.

Pictures are arrays [height, width, 3] of uint8. They are made of sums and products alone, so that an address gives the same
pixels on every machine.
"""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np

from unift.types import Picture

COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.7, 0.2),
    "blue": (0.15, 0.25, 0.9),
    "yellow": (0.9, 0.85, 0.15),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
}
SHAPES = ("disc", "square", "cross")
GROUND = 0.5  # grey around a single shape or tile
NOISE = 0.08  # the largest change of a pixel, in parts of the full range


def landscape(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A scene whose light side is above and whose warm side is left, with two or three shapes over its middle lines."""
    y, x = _axes(height, width)
    light = rng.uniform(0.4, 0.6) + rng.uniform(0.35, 0.6) * (0.5 - y)
    warm = rng.uniform(0.25, 0.45) * (0.5 - x)
    tint = rng.uniform(-0.06, 0.06, 3)
    scene = np.stack([light + warm + tint[0], light + 0 * warm + tint[1], light - warm + tint[2]], axis=-1)
    for _ in range(int(rng.integers(2, 4))):
        place = rng.uniform(0.1, 0.9, 2)
        place[int(rng.integers(2))] = 0.5  # over a border, so that it is seen in several tiles
        where = _inside(SHAPES[int(rng.integers(3))], y, x, place, rng.uniform(0.08, 0.16))
        scene[where] = 0.6 * scene[where] + 0.4 * rng.random(3)
    return _pixels(rng, scene)


def single(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str, str]:
    """(picture, colour, shape): one shape on grey, near the middle."""
    y, x = _axes(height, width)
    colour, shape = list(COLOURS)[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(3))]
    scene = np.full((height, width, 3), GROUND) + rng.uniform(-0.1, 0.1)
    where = _inside(shape, y, x, rng.uniform(0.4, 0.6, 2), rng.uniform(0.22, 0.32))
    scene[where] = np.array(COLOURS[colour]) + rng.uniform(-0.08, 0.08, 3)
    return _pixels(rng, scene), colour, shape


def shuffled(scene: np.ndarray, rows: int, cols: int, order: list[int]) -> np.ndarray:
    """The tiles of a scene in another order: in reading order, the tile that stands there belongs to place ``order[i]``."""
    h, w = scene.shape[0] // rows, scene.shape[1] // cols
    made = np.empty_like(scene)
    for i, place in enumerate(order):
        made[_tile(i, cols, h, w)] = scene[_tile(place, cols, h, w)]
    return made


def alone(rng: np.random.Generator, scene: np.ndarray, rows: int, cols: int, place: int) -> np.ndarray:
    """One tile of a scene on grey, at any place."""
    h, w = scene.shape[0] // rows, scene.shape[1] // cols
    made = _pixels(rng, np.full(scene.shape, GROUND))
    made[_tile(int(rng.integers(rows * cols)), cols, h, w)] = scene[_tile(place, cols, h, w)]
    return made


def squared(pixels: np.ndarray) -> np.ndarray:
    """The picture in the upper left corner of a grey square [edge, edge, 3], edge = max(height, width)."""
    height, width, _ = pixels.shape
    made = np.full((max(height, width),) * 2 + (3,), round(255 * GROUND), np.uint8)
    made[:height, :width] = pixels
    return made


def png(pixels: np.ndarray) -> Picture:
    """A PNG without compression: packers differ from machine to machine, and these bytes are what a picture is known by."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + pixels[i].tobytes() for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    blocks = [lines[i : i + 0xFFFF] for i in range(0, len(lines), 0xFFFF)]
    stored = b"".join(
        struct.pack("<BHH", number == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
        for number, block in enumerate(blocks)
    )
    packed = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(lines))
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")
    return Picture(hashlib.sha256(data).hexdigest(), data=data)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _axes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths of the pixels' centres, 0 to 1, each [height, width]."""
    y, x = (np.arange(n) + 0.5 for n in (height, width))
    return np.repeat(y[:, None] / height, width, axis=1), np.repeat(x[None] / width, height, axis=0)


def _inside(shape: str, y: np.ndarray, x: np.ndarray, place: np.ndarray, radius: float) -> np.ndarray:
    """bool [height, width]: where a shape of this radius around ``place`` lies."""
    dy, dx = np.abs(y - place[0]), np.abs(x - place[1])
    if shape == "disc":
        return dy * dy + dx * dx < radius * radius
    box = np.maximum(dy, dx) < radius
    return box if shape == "square" else box & (np.minimum(dy, dx) < radius / 3)


def _pixels(rng: np.random.Generator, scene: np.ndarray) -> np.ndarray:
    noisy = scene + rng.uniform(-NOISE, NOISE, scene.shape)
    return np.floor(np.minimum(np.maximum(noisy, 0.0), 1.0) * 255 + 0.5).astype(np.uint8)


def _tile(place: int, cols: int, height: int, width: int) -> tuple[slice, slice]:
    top, left = place // cols * height, place % cols * width
    return slice(top, top + height), slice(left, left + width)
