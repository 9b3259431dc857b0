"""HDF5 files read within bounds (nothing outside the file, nothing larger than the file can hold), and written.

An HDF5 file may name other files to read from (external links, external raw storage, virtual datasets) and claim any
shape, since blocks that were never written read as zeros. Here both are refused before anything is opened or allocated,
and whatever h5py raises at a damaged file becomes one sentence with the file, the key and what to do.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5l, h5s

from offrl.utils.errors import OffrlError, one_line

# Deflate packs at most 1,032 bytes into one, so no honest array is larger than this many times its file.
DENSEST = 1100
# Blocks that were never written (flags that are all zero, say) are taken up to this many times the file's size.
UNWRITTEN = 8


def unreadable(path: Path, key: str, error: Exception) -> OffrlError:
    """The sentence for what h5py or numpy raised while `key` was read."""
    reason = one_line(error.args[0] if error.args else type(error).__name__)
    if isinstance(error, MemoryError):
        return OffrlError(f"{path}: {key} is larger than this machine's memory ({reason}); use a smaller dataset.")
    if "plugin" in reason or "required filter" in reason:
        return OffrlError(
            f"{path}: {key} is packed with an HDF5 filter that is not here ({reason}); pack it with gzip."
        )
    return OffrlError(f"{path}: {key} cannot be read, the file is damaged ({reason}); fetch or write it again.")


@contextmanager
def reading(path: Path, key: str) -> Iterator[None]:
    """Turn whatever is raised inside into an OffrlError about `key`."""
    try:
        yield
    except OffrlError:
        raise
    except Exception as error:  # h5py has no exception of its own: KeyError, RuntimeError, ValueError, OSError, ...
        raise unreadable(path, key, error) from error


def open_hdf5(path: Path) -> h5py.File:
    """Open for reading.

    Raises:
        OffrlError: cut off, damaged, no HDF5, being written by another process, or with a link to another file.
    """
    try:
        # Without a chunk cache, since every chunk is read once: it would cost 8 MB an array.
        file = h5py.File(path, "r", rdcc_nbytes=0)
    except Exception as error:
        text = one_line(error)
        if "truncated file" in text:
            have, want = re.search(r"eof = (\d+)", text), re.search(r"stored_eof = (\d+)", text)
            sizes = f" after {have[1]} of {want[1]} bytes" if have and want else ""
            raise OffrlError(f"{path}: the file is cut off{sizes}; fetch or copy it again.") from error
        if "signature not found" in text:
            raise OffrlError(f"{path}: this is no HDF5 file; fetch or write it again.") from error
        if "lock file" in text or "already open for write" in text:
            raise OffrlError(f"{path}: another process is writing it; wait until that is done.") from error
        raise OffrlError(f"{path}: HDF5 cannot open it ({text}); fetch or write it again.") from error
    with reading(path, "its list of keys"):
        link = file.id.links.visit(_foreign, info=True)
    if link is not None:
        file.close()
        name = one_line(link.decode(errors="replace"))
        raise OffrlError(f"{path}: {name} is a link to another file, which is not followed; copy the data into it.")
    return file


def _foreign(name: bytes, info: Any) -> bytes | None:
    """The name of a link that leaves the file (external, or of a user's own kind), which ends the visit."""
    return name if info.type >= h5l.TYPE_EXTERNAL else None


def keys(group: h5py.Group, path: Path) -> list[str]:
    """The names in a group, sorted."""
    with reading(path, "its list of keys"):
        return sorted(one_line(key.decode(errors="replace")) for key in group.id)


def attribute(group: h5py.Group, name: str, path: Path) -> Any:
    """An attribute's value; None where there is none."""
    with reading(path, name):
        if name not in group.attrs:
            return None
        return group.attrs[name]


def column(group: h5py.Group, key: str, path: Path) -> h5py.Dataset:
    """An array with one row a step, whose numbers lie in the file.

    Raises:
        OffrlError: a group, a single number, numbers in another file, or more rows than the file can hold.
    """
    with reading(path, key):
        dataset = group[key]
        if not isinstance(dataset, h5py.Dataset):
            raise OffrlError(f"{path}: {key} is a group, not an array; this is no D4RL file.")
        if not dataset.shape:  # () or, of a null space, None; no row at all is (0,)
            raise OffrlError(f"{path}: {key} is a single number, not one row a step; this is no D4RL file.")
        check_inside(dataset.id, dataset.nbytes, path.stat().st_size, path, key)
        return dataset


def check_inside(dataset: h5d.DatasetID, claimed: int, room: int, path: Path, key: str) -> None:
    """Refuse an array whose numbers lie elsewhere, and one that claims more of them than the file can hold.

    Minari's files hold tens of thousands of arrays, hence low-level calls and as few of them as may be.

    Args:
        claimed: bytes that the array's shape asks for. room: size of the file in bytes.
    """
    if dataset.get_offset() is not None:
        return  # one piece of this file, whose length HDF5 itself checks when it opens the array
    try:
        chunks = dataset.get_num_chunks()
    except RuntimeError as error:  # not in chunks: small, never written, or elsewhere
        plist, chunks = dataset.get_create_plist(), 0
        if plist.get_layout() == h5d.VIRTUAL or plist.get_external_count():
            raise OffrlError(
                f"{path}: {key} is an external or virtual array; write its numbers into the file itself."
            ) from error
    if claimed <= UNWRITTEN * room:
        return
    chunk = dataset.get_create_plist().get_chunk() if chunks else ()
    written = chunks * math.prod(chunk) * dataset.dtype.itemsize
    if claimed > min(written, DENSEST * room):
        claim = f"shape {dataset.shape}, {claimed:,} bytes"
        raise OffrlError(
            f"{path}: {key} claims {claim}, which its {room:,} bytes cannot hold; fetch or write it again."
        )


def check_file(path: Path) -> None:
    """Hold every array of a file that another package reads to `check_inside`."""

    def check(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            check_inside(item.id, item.nbytes, room, path, one_line(name))

    room = path.stat().st_size
    with open_hdf5(path) as file, reading(path, "its list of arrays"):
        file.visititems(check)


def row_blocks(dataset: h5py.Dataset) -> Iterator[tuple[int, int]]:
    """(first row, rows) of blocks of some 16k rows that cut no chunk, so that each chunk is unpacked once."""
    chunk = dataset.chunks[0] if dataset.chunks else 1
    step = chunk * -(-16_384 // chunk)
    for start in range(0, dataset.shape[0], step):
        yield start, min(step, dataset.shape[0] - start)


def read_into(dataset: h5py.Dataset, out: np.ndarray, path: Path) -> None:
    """Read a whole array into `out` in blocks, converting the type on the way: no float64 copy is ever held.

    The low-level calls skip a selection that costs `read_direct` a third more time.
    """
    key, rest = str(dataset.name).lstrip("/"), dataset.shape[1:]
    with reading(path, key):
        space = dataset.id.get_space()
        for start, rows in row_blocks(dataset):
            space.select_hyperslab((start, *[0] * len(rest)), (rows, *rest))
            dataset.id.read(h5s.create_simple((rows, *rest)), space, out[start : start + rows])


class _Disk(io.FileIO):
    """A file that remembers its first failed write and leaves out all that follow.

    HDF5 can't close a file while writes fail: it tries again whenever an object is let go, and crashes at exit.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        try:
            while rest and self.failure is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
        return length


@contextmanager
def create_hdf5(path: Path, **options: Any) -> Iterator[h5py.File]:
    """Create a file to write into.

    Raises:
        OSError: the disk is full, or the file can't be written for another reason.
    """
    with _Disk(path, "w+") as disk:
        try:
            with h5py.File(disk, "w", **options) as file:
                yield file
        finally:
            if disk.failure is not None:  # what h5py makes of it is a RuntimeError or a ValueError
                raise disk.failure
