"""Layers as streams: reading a compressed tar forward with its diff ID, writing one with diff ID and digest in a pass.

Headers are read in tarheaders.py and written here: PAX, byte-exact names, nanosecond times, 10 µs a member where
`tarfile` needs 60. Left out: what members do to a file system (extract.py) and where they come from (pack.py).

Sources: OCI image-spec layer.md; POSIX pax, "ustar Interchange Format".
"""

from __future__ import annotations

import functools
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ..errors import LayerError
from .tarheaders import BLOCK, Member, headers

CHUNK = 1 << 20
MAX_FRAMES = 1 << 20
"""gzip members or zstd frames of a blob. Each costs a decompressor; eStargz and zstd:chunked make one for each file."""
_FIRST_STEP = 1 << 9
_MAGIC = 6  # bytes that tell a format
_XZ_MEMORY = 96 << 20  # `xz -9` wants 65 MiB; a header can ask for 4 GiB
LIMIT_HINT = "LABKERNEL_LIMITS={}=… or [limits] in registries.toml sets another limit"


class _Gunzip:
    def __init__(self) -> None:
        from isal import isal_zlib

        self._inner: Any = isal_zlib.decompressobj(wbits=31)

    def feed(self, data: bytes, limit: int) -> bytes:
        return bytes(self._inner.decompress(self._inner.unconsumed_tail + data, limit))

    @property
    def pending(self) -> bool:
        return bool(self._inner.unconsumed_tail)

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused(self) -> bytes:
        return bytes(self._inner.unused_data)


class _Inflater:
    """zstd, xz and bzip2: their decompressors are one interface."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def feed(self, data: bytes, limit: int) -> bytes:
        return bytes(self._inner.decompress(data, limit))

    @property
    def pending(self) -> bool:
        return not self._inner.eof and not self._inner.needs_input

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused(self) -> bytes:
        return bytes(self._inner.unused_data)


def _unzstd() -> _Inflater:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd
    return _Inflater(zstd.ZstdDecompressor())


def _unxz() -> _Inflater:
    import lzma

    return _Inflater(lzma.LZMADecompressor(memlimit=_XZ_MEMORY))


def _bunzip2() -> _Inflater:
    import bz2

    return _Inflater(bz2.BZ2Decompressor())


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    # By the bytes, as every engine does: media types in the wild are wrong often enough.
    if head.startswith(b"\x1f\x8b"):
        return _Gunzip
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return _unzstd
    if head.startswith(b"\xfd7zXZ"):  # xz and bzip2 are no layer formats, but ADD unpacks them
        return _unxz
    if head.startswith(b"BZh"):
        return _bunzip2
    return None


class GrowingFile:
    """A file that another process is still writing, read as if it were whole: `read` waits where there is no more yet.

    `wake_fd` is a pipe: any byte means "look again", `E` that the file has ended, `X` (or the pipe's end before either)
    that the writer gave up.
    """

    END = b"E"
    GIVEN_UP = b"X"

    def __init__(self, fd: int, wake_fd: int) -> None:
        self._fd = fd
        self._wake_fd = wake_fd
        self._ended = False

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, and none only at the end. Raises LayerError when the writer gave up."""
        while True:
            # Asked before the read: bytes written before the end was told are then seen.
            ended = self._ended
            data = os.read(self._fd, size)
            if data or ended:
                return data
            told = os.read(self._wake_fd, 4096)
            if not told or self.GIVEN_UP in told:
                raise LayerError("the layer's download was broken off")
            self._ended = self.END in told


class BlobStream:
    """The uncompressed bytes of a gzip, zstd or plain blob, forward only, hashed as they pass.

    Offers what `tarheaders` asks for: read, tell, and seek to a later place. Raises LayerError for broken
    compression and beyond `max_bytes` of output, so a compression bomb ends there.
    """

    def __init__(
        self, fd: int, *, max_bytes: int, read: Callable[[int], bytes] | None = None, hashed: bool = True
    ) -> None:
        """Reads from the descriptor `fd`, which stays the caller's, or with `read` (as `os.read`, without the fd).
        `hashed` is off where nobody asks for the digest: it takes longer than the rest."""
        self._read = read or (lambda size: os.read(fd, size))
        self._max = max_bytes
        self._sha = hashlib.sha256()
        self._hashed = hashed
        self._buffer = b""
        self._at = 0  # in _buffer
        self._produced = 0
        head = self._read(CHUNK)
        while len(head) < _MAGIC and (more := self._read(CHUNK)):  # a pipe, or a file that is still growing
            head += more
        self._make = _decompressor(head)
        self._inner = self._make() if self._make else None
        self._input = head
        self._at_input = 0  # what is before that in _input has been given away
        self._step = CHUNK
        self._frames = 0
        self._ended = not head

    def _more(self) -> bool:
        """Refill the buffer; False at the end of the stream."""
        while not self._ended:
            data = self._next_plain() if self._inner is None else self._next_inflated()
            if data:
                self._produced += len(data)
                if self._produced > self._max:
                    raise LayerError(
                        f"layer unpacks to more than {self._max} bytes", resolution=LIMIT_HINT.format("layer_bytes")
                    )
                if self._hashed:
                    self._sha.update(data)
                self._buffer, self._at = data, 0
                return True
        return False

    def _next_plain(self) -> bytes:
        data, self._input = self._input or self._read(CHUNK), b""
        self._ended = not data
        return data

    def _next_inflated(self) -> bytes:
        inner = self._inner
        assert inner is not None
        if inner.eof:
            return self._next_frame()
        data = b""
        if not inner.pending:
            data = self._take_input()
            if not data:
                raise LayerError("compressed layer ends too early", resolution="fetch the image again")
        try:
            out: bytes = inner.feed(data, CHUNK)
        except Exception as err:  # each library has its own class
            raise LayerError(f"layer does not decompress: {err}", resolution="fetch the image again") from err
        if inner.eof:
            self._at_input -= len(inner.unused)
        return out

    def _take_input(self) -> bytes:
        """Some more input. Little after the end of a frame, then more and more: what a frame does not need is copied
        by its library, and a blob can be of nothing but tiny frames."""
        if self._at_input >= len(self._input):
            self._input, self._at_input = self._read(CHUNK), 0
        at, self._at_input = self._at_input, min(self._at_input + self._step, len(self._input))
        self._step = min(4 * self._step, CHUNK)
        return self._input if self._at_input - at == len(self._input) else self._input[at : self._at_input]

    def _next_frame(self) -> bytes:
        # gzip members and zstd frames may follow each other; zero padding may follow them, anything else may not.
        while len(self._input) - self._at_input < _MAGIC and (more := self._read(CHUNK)):  # known by its first bytes
            self._input, self._at_input = self._input[self._at_input :] + more, 0
        self._step = _FIRST_STEP
        self._frames += 1
        if self._frames > MAX_FRAMES:
            raise LayerError(f"the compressed layer is of more than {MAX_FRAMES} pieces")
        if _decompressor(self._input[self._at_input : self._at_input + _MAGIC] + bytes(_MAGIC)) is self._make:
            assert self._make is not None
            self._inner = self._make()
            return b""
        rest = self._input[self._at_input :]
        while rest:
            if rest.strip(b"\0"):
                raise LayerError("something follows the end of the compressed layer")
            rest = self._read(CHUNK)
        self._ended = True
        return b""

    def tell(self) -> int:
        return self._produced - len(self._buffer) + self._at

    def seek(self, position: int) -> int:
        missing = position - self.tell()
        if missing < 0:
            raise LayerError("layer tar cannot be read forward")
        for _ in self.chunks(missing, allow_end=True):
            pass
        return self.tell()

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        end = self._at + size
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        return b"".join(bytes(part) for part in self.chunks(size, allow_end=True))

    def chunks(self, size: int, *, allow_end: bool = False) -> Iterable[memoryview]:
        """The next `size` bytes in pieces, uncopied; each piece is valid until the next is asked for."""
        while size > 0:
            if self._at >= len(self._buffer) and not self._more():
                if allow_end:
                    return
                raise LayerError("layer tar ends inside a file", resolution="fetch the image again")
            piece = memoryview(self._buffer)[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            yield piece

    def finish(self) -> tuple[str, int]:
        """Read to the very end (the hash is of all bytes, padding included): (diff ID, uncompressed size)."""
        self._at = len(self._buffer)
        while self._more():
            self._at = len(self._buffer)
        return f"sha256:{self._sha.hexdigest()}", self._produced


def members(stream: BlobStream, *, max_members: int) -> Iterable[Member]:
    """The members of a tar in order; their data is next on `stream` while each is handled. Raises LayerError."""
    for count, member in enumerate(headers(stream)):
        if count >= max_members:
            raise LayerError(
                f"layer has more than {max_members} members", resolution=LIMIT_HINT.format("layer_members")
            )
        yield member


class Sink(Protocol):
    """Where a TarWriter's bytes go."""

    def write(self, data: bytes | memoryview, /) -> object: ...


class TarWriter:
    """Writes members; the caller gives the data after each `header` and calls `pad(size)`."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink

    def header(
        self,
        name: bytes,
        kind: bytes,
        *,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        size: int = 0,
        mtime_ns: int = 0,
        linkname: bytes = b"",
        device: int = 0,
        records: Mapping[bytes, bytes] | None = None,
    ) -> None:
        """One header, preceded by a PAX header for what ustar cannot say. `records` are PAX records to add."""
        pax: dict[bytes, bytes] = {}
        if len(name) > 100:
            pax[b"path"] = name
        if len(linkname) > 100:
            pax[b"linkpath"] = linkname
        seconds, rest = divmod(mtime_ns, 1_000_000_000)
        if rest or not 0 <= seconds < 1 << 33:
            pax[b"mtime"] = decimal_seconds(mtime_ns)
        for key, value, most in ((b"uid", uid, 0o7777777), (b"gid", gid, 0o7777777), (b"size", size, (1 << 33) - 1)):
            if value > most:
                pax[key] = b"%d" % value
        if records:
            pax.update(records)
        if pax:
            body = pax_body(pax)
            self.sink.write(_ustar(b"PaxHeaders/" + name.rstrip(b"/")[:80], b"x", 0o644, 0, 0, len(body), 0, b"", 0))
            self.sink.write(body)
            self.pad(len(body))
        self.sink.write(_ustar(name, kind, mode, uid, gid, size, seconds, linkname, device))

    def pad(self, size: int) -> None:
        """Fill up to a whole block after `size` bytes of data."""
        if size % BLOCK:
            self.sink.write(bytes(BLOCK - size % BLOCK))

    def close(self) -> None:
        """The two empty blocks that end a tar."""
        self.sink.write(bytes(2 * BLOCK))


def decimal_seconds(time_ns: int) -> bytes:
    """A PAX time: seconds with as many decimals as needed."""
    sign = b"-" if time_ns < 0 else b""
    seconds, rest = divmod(abs(time_ns), 1_000_000_000)
    return sign + (b"%d.%09d" % (seconds, rest)).rstrip(b"0").rstrip(b".")


def pax_body(records: Mapping[bytes, bytes]) -> bytes:
    """PAX records (`length key=value\\n`, the length counting itself), sorted by key."""
    out = []
    for key in sorted(records):
        rest = b" " + key + b"=" + records[key] + b"\n"
        length = len(rest) + len(str(len(rest)))
        if len(rest) + len(str(length)) != length:
            length += 1
        out.append(b"%d" % length + rest)
    return b"".join(out)


def _ustar(
    name: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, linkname: bytes, device: int
) -> bytes:
    head = name[:100].ljust(100, b"\0") + b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        mode & 0o7777,
        min(uid, 0o7777777),
        min(gid, 0o7777777),
        min(size, (1 << 33) - 1),
        min(max(mtime, 0), (1 << 33) - 1),
    )
    tail = _tail(kind, linkname, device) if linkname or device else _plain_tail(kind)
    # The checksum is the sum of all bytes with eight blanks in its own place (pax(1), "ustar Interchange Format").
    return b"%s%06o\0 %s" % (head, sum(head) + 8 * 32 + tail[1], tail[0])


def _tail(kind: bytes, linkname: bytes, device: int) -> tuple[bytes, int]:
    """What follows the checksum, and the sum of its bytes."""
    names = kind + linkname[:100].ljust(100, b"\0") + b"ustar\x0000" + bytes(64)
    tail = names + b"%07o\0%07o\0" % (os.major(device), os.minor(device)) + bytes(167)
    return tail, sum(tail)


@functools.lru_cache(maxsize=16)
def _plain_tail(kind: bytes) -> tuple[bytes, int]:
    return _tail(kind, b"", 0)


class _Gathering(ABC):
    """Headers are 512 bytes: they are gathered, so that hash, compressor and kernel see large pieces."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._waiting = 0

    def write(self, data: bytes | memoryview) -> None:
        self._pending.append(bytes(data))
        self._waiting += len(data)
        if self._waiting >= CHUNK // 4:
            self.flush()

    def flush(self) -> None:
        """Give away what has been gathered."""
        data, self._pending, self._waiting = b"".join(self._pending), [], 0
        self._take(data)

    @abstractmethod
    def _take(self, data: bytes) -> None: ...


class LayerWriter(_Gathering):
    """A sink that makes a layer blob: sha256 of the tar (diff ID) -> gzip -> sha256 of the blob (digest) -> `fd`.

    The gzip header carries no name and no time, so equal trees give equal blobs.
    """

    def __init__(self, fd: int, *, compress: bool = True) -> None:
        from isal import isal_zlib

        super().__init__()
        self._fd = fd
        self._plain = hashlib.sha256()
        self._packed = hashlib.sha256()
        self._gzip: Any = isal_zlib.compressobj(2, wbits=31) if compress else None
        self.size = 0
        self.blob_size = 0

    def _take(self, data: bytes) -> None:
        self.size += len(data)
        self._plain.update(data)
        self._emit(self._gzip.compress(data) if self._gzip else data)

    def _emit(self, data: bytes) -> None:
        if data:
            self._packed.update(data)
            self.blob_size += len(data)
            write_all(self._fd, data)

    def finish(self) -> tuple[str, str]:
        """Flush everything: (diff ID, digest of the blob)."""
        self.flush()
        if self._gzip:
            self._emit(self._gzip.flush())
        return f"sha256:{self._plain.hexdigest()}", f"sha256:{self._packed.hexdigest()}"


class FdSink(_Gathering):
    """A sink that writes to a descriptor, gathering small writes."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def _take(self, data: bytes) -> None:
        write_all(self._fd, data)

    def take_file(self, fd: int, offset: int, length: int) -> int:
        """Up to `length` bytes of the file `fd` from `offset` on, not copied through this process; returns how many."""
        self.flush()
        return os.sendfile(self._fd, fd, offset, length)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """write(2) until everything is written. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def is_tar(fd: int) -> bool:
    """Whether the file `fd` (read from its start) is a tar, plain or compressed, that ADD unpacks."""
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        block = BlobStream(fd, max_bytes=1 << 62).read(BLOCK)
    except LayerError:
        return False
    finally:
        os.lseek(fd, 0, os.SEEK_SET)
    if len(block) < BLOCK:
        return False
    try:
        stored = int(block[148:156].strip(b"\0 ") or b"-1", 8)
    except ValueError:
        return False
    return stored == sum(block) - sum(block[148:156]) + 8 * 32
