"""Checksums of tensors that several threads can work out together, in tiles, in any order of pieces.

xxh3_128 over the concatenated xxh3_64 digests (big-endian) of consecutive pieces of 4 MiB. The size of a piece is
part of the format.
"""

import threading
from pathlib import Path

import numpy as np
import xxhash

PIECE = 4 << 20


def as_bytes(data) -> np.ndarray:
    """The bytes of a contiguous array or buffer, without a copy: [nbytes] uint8."""
    if isinstance(data, np.ndarray):
        return data.reshape(-1).view(np.uint8)
    return np.frombuffer(data, np.uint8)


def checksum(data) -> str:
    """The checksum of a contiguous array or buffer, 32 hexadecimal digits."""
    flat = as_bytes(data)
    pieces = PieceChecksum(flat.size)
    pieces.update(0, flat)
    return pieces.hexdigest()


def checksum_file(path: Path) -> str:
    """The checksum of a file's bytes."""
    pieces = PieceChecksum(path.stat().st_size)
    with open(path, "rb") as file:
        for first_byte in range(0, pieces.nbytes, PIECE):
            pieces.update(first_byte, file.read(PIECE))
    return pieces.hexdigest()


class PieceChecksum:
    """The checksum of `nbytes` bytes that arrive as tiles from any thread.

    Pieces in any order, each piece's own bytes in ascending order.
    """

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self._digests: list[bytes | None] = [None] * -(-nbytes // PIECE)
        self._open: dict[int, tuple[xxhash.xxh3_64, int]] = {}
        self._lock = threading.Lock()

    def update(self, first_byte: int, data) -> None:
        """Add the tile `data`, which begins at `first_byte`.

        Raises ValueError for one that neither begins a piece nor continues it.
        """
        flat, done = as_bytes(data), 0
        while done < flat.size:
            piece, position = divmod(first_byte + done, PIECE)
            tile = flat[done : done + PIECE - position]
            self._update_piece(piece, position, tile)
            done += tile.size

    def _update_piece(self, piece: int, position: int, tile: np.ndarray) -> None:
        with self._lock:
            state, expected = self._open.pop(piece, (None, 0))
        if position != expected or (state is None and self._digests[piece] is not None):
            raise ValueError(f"byte {position} of piece {piece} came when byte {expected} was due")
        state = state or xxhash.xxh3_64()
        state.update(tile)
        position += tile.size
        with self._lock:
            if position == min(PIECE, self.nbytes - piece * PIECE):
                self._digests[piece] = state.digest()
            else:
                self._open[piece] = (state, position)

    @property
    def complete(self) -> bool:
        """Whether every tile has come."""
        return None not in self._digests

    def hexdigest(self) -> str:
        """The checksum. Raises ValueError while tiles are missing."""
        if None in self._digests:
            raise ValueError(f"{self._digests.count(None)} of {len(self._digests)} pieces are missing")
        return xxhash.xxh3_128(b"".join(self._digests)).hexdigest()
