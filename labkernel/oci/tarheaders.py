"""The headers of a tar, read forward and once: ustar, PAX, GNU long names, old and new sparse files.

The standard library's `tarfile` is made for archives of one's own: it calls itself once for each extended header (some
hundred in a row end in RecursionError), keeps what global ones say for ever, believes a sparse map of any length, and
the Python of Debian 12 needs hours for one PAX header of a million digits (CVE-2024-6232). Here each header takes time
and memory in proportion to its bytes, and those are bounded. Global PAX headers are skipped, as docker and podman do.

Source: POSIX pax, "pax Header Block", "ustar Interchange Format"; GNU tar manual, "Storing Sparse Files", "Basic Tar
Format". Left out: what members do to a file system (extract.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Protocol

from ..errors import LayerError

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20
"""One PAX or GNU long-name header; xattr values are at most 64 KiB each."""
MAX_EXTENDED = 64
"""Extended headers before a member; there are hardly ever more than two."""
MAX_PIECES = 1 << 18
"""Pieces of a sparse file."""

_REG, _LINK, _SYM, _CHR, _BLK, _DIR, _FIFO, _CONT = b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7"
_OLD_REG, _OLD_SPARSE = b"\0", b"S"
_LONG_NAME, _LONG_LINK, _PAX, _GLOBAL, _SOLARIS_PAX = b"L", b"K", b"x", b"g", b"X"
_EXTENDED = frozenset({_LONG_NAME, _LONG_LINK, _PAX, _GLOBAL, _SOLARIS_PAX})
# Members whose size says nothing about data that follows.
_WITHOUT_DATA = frozenset({_LINK, _SYM, _CHR, _BLK, _DIR, _FIFO})
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x")
_ZERO = bytes(BLOCK)
_SPARSE_PREFIX = "GNU.sparse."


class Stream(Protocol):
    """What is read: forward only. `seek` goes on to a later place, or to the end where that comes first."""

    def read(self, size: int, /) -> bytes: ...
    def tell(self) -> int: ...
    def seek(self, position: int, /) -> int: ...


class Member:
    """A member: its header's fields with what extended headers say in their place.

    Text is UTF-8 with surrogateescape, so `os.fsencode` gives the bytes back. `size` is of the file, `stored` of its
    data in the archive: less for a sparse file, whose pieces are in `sparse`.
    """

    __slots__ = (
        "devmajor",
        "devminor",
        "gid",
        "linkname",
        "mode",
        "mtime",
        "name",
        "pax_headers",
        "size",
        "sparse",
        "stored",
        "type",
        "uid",
    )

    def __init__(self, block: bytes) -> None:
        """From a header block. Raises LayerError when it is none."""
        fields = _HEADER.unpack(block)
        checksum = _number(fields[6], "checksum")
        # The sum of all bytes, with eight blanks in its own place.
        if checksum != sum(block) - sum(fields[6]) + 8 * 32 and checksum != _signed_sum(block):
            raise LayerError("layer tar is broken: a header's checksum is wrong", resolution="fetch the image again")
        self.type: bytes = fields[7]
        self.size = self.stored = _number(fields[4], "size")
        if self.type in _EXTENDED:
            return  # of those, which are every second header, nothing else is asked for
        name, mode, uid, gid, _, mtime, _, _, link, magic, _, _, major, minor, prefix = fields
        self.name = _text(name)
        self.mode = _number(mode, "mode")
        self.uid = _number(uid, "owner")
        self.gid = _number(gid, "group")
        self.mtime = _number(mtime, "time")
        self.linkname = _text(link)
        self.devmajor = self.devminor = 0
        if self.type in (_CHR, _BLK):
            self.devmajor, self.devminor = _number(major, "device"), _number(minor, "device")
        if prefix[0] and magic[:6] == b"ustar\0":  # GNU's own format has times there
            self.name = f"{_text(prefix)}/{self.name}"
        self.pax_headers: dict[str, str] = {}
        self.sparse: list[tuple[int, int]] | None = None

    @property
    def is_extended(self) -> bool:
        """Whether it is no member but says something about the next."""
        return self.type in _EXTENDED

    @property
    def is_known(self) -> bool:
        """Whether its type is one of POSIX, or an old sparse file."""
        return self.type in _WITHOUT_DATA or self.isreg()

    def isreg(self) -> bool:
        return self.type in (_REG, _CONT, _OLD_SPARSE)

    def isdir(self) -> bool:
        return self.type == _DIR

    def issym(self) -> bool:
        return self.type == _SYM

    def islnk(self) -> bool:
        return self.type == _LINK

    def ischr(self) -> bool:
        return self.type == _CHR

    def isfifo(self) -> bool:
        return self.type == _FIFO

    def take(self, extended: dict[bytes, bytes], records: dict[str, str]) -> None:
        """Put what extended headers said in its place: GNU's by type, PAX records by key. Raises LayerError."""
        path, link = records.get("path"), records.get("linkpath")
        self.name = _text(extended[_LONG_NAME]) if _LONG_NAME in extended else path or self.name
        self.linkname = _text(extended[_LONG_LINK]) if _LONG_LINK in extended else link or self.linkname
        for key in ("uid", "gid", "size"):
            if records.get(key):
                setattr(self, key, _decimal(records[key], key))
        self.stored = self.size
        self.pax_headers = records


def headers(stream: Stream) -> Iterator[Member]:
    """The members of a tar in order; the data of each is next on `stream` while it is handled. Raises LayerError.

    An archive may end without the two empty blocks that POSIX wants: many writers leave them out.
    """
    extended: dict[bytes, bytes] = {}
    records: dict[bytes, bytes] = {}
    pieces: list[tuple[int, int]] = []
    before = 0
    while True:
        block = stream.read(BLOCK)
        if not block or block == _ZERO:
            if before:
                raise LayerError("layer tar is broken: an extended header stands before nothing")
            return
        if len(block) < BLOCK:
            raise LayerError("layer tar is broken: truncated header", resolution="fetch the image again")
        member = Member(block)
        if member.is_extended:
            before += 1
            if before > MAX_EXTENDED:
                raise LayerError(f"layer tar has more than {MAX_EXTENDED} extended headers in a row")
            body = _body(stream, member.size)
            if member.type in (_PAX, _SOLARIS_PAX):
                records, pieces = _records(body)
            elif member.type != _GLOBAL:
                extended[member.type] = body
            continue
        if before:
            member.take(extended, {_decode(key): _decode(value) for key, value in records.items()})
            extended, records, before = {}, {}, 0
        yield from _with_data(stream, member, pieces, block)
        pieces = []


def _with_data(stream: Stream, member: Member, pieces: list[tuple[int, int]], block: bytes) -> Iterator[Member]:
    """The member, with its sparse map read; and then on to the header after its data."""
    if member.size < 0:
        raise LayerError(f"{member.name}: a size of {member.size} bytes")
    if member.type == _OLD_REG:
        member.type = _DIR if member.name.endswith("/") else _REG
    if member.type in _WITHOUT_DATA:
        member.size = member.stored = 0
        if member.isdir():
            member.name = member.name.rstrip("/")
        yield member
        return
    end = stream.tell() + member.stored + -member.stored % BLOCK
    if member.type == _OLD_SPARSE:
        _old_sparse(stream, member, block)
        end = stream.tell() + member.stored + -member.stored % BLOCK
    elif pieces or any(key.startswith(_SPARSE_PREFIX) for key in member.pax_headers):
        _pax_sparse(stream, member, pieces)
    yield member
    if stream.seek(end) < end:
        raise LayerError("layer tar is broken: unexpected end of data", resolution="fetch the image again")


def _body(stream: Stream, size: int) -> bytes:
    """The data of an extended header."""
    if not 0 <= size <= MAX_HEADER_BYTES:
        raise LayerError(f"layer tar has a header of {size} bytes")
    body = stream.read(size + -size % BLOCK)
    if len(body) < size:
        raise LayerError("layer tar is broken: truncated header", resolution="fetch the image again")
    return body[:size]


def _records(body: bytes) -> tuple[dict[bytes, bytes], list[tuple[int, int]]]:
    """PAX records (`length key=value\\n`), the last of a key winning; and the sparse pieces, whose keys repeat."""
    found: dict[bytes, bytes] = {}
    pieces: list[tuple[int, int]] = []
    offset = -1
    at = 0
    while at < len(body) and body[at]:
        blank = body.find(b" ", at, at + 20)
        length = body[at:blank]
        end = at + int(length) if blank > 0 and length.isdigit() else 0
        equals = body.find(b"=", blank + 1, end)
        if not (blank < equals < end <= len(body)) or body[end - 1 : end] != b"\n" or equals == blank + 1:
            raise LayerError("layer tar is broken: invalid PAX header")
        key, value = body[blank + 1 : equals], body[equals + 1 : end - 1]
        at = end
        if key == b"GNU.sparse.offset":
            offset = _decimal(_decode(value), "sparse map")
        elif key == b"GNU.sparse.numbytes":
            pieces.append((offset, _decimal(_decode(value), "sparse map")))
        elif value:
            found[key] = value
        else:  # an empty value takes back what was said
            found.pop(key, None)
    return found, pieces


# -- sparse files ------------------------------------------------------------------------------------------------------


def _old_sparse(stream: Stream, member: Member, block: bytes) -> None:
    """GNU's old form: four pieces in the header, 21 in each block that may follow it."""
    pieces: list[tuple[int, int]] = []
    size = _number(block[483:495], "size")
    _old_pieces(block, 386, 4, pieces)
    more = block[482]
    while more:
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise LayerError("layer tar is broken: truncated header", resolution="fetch the image again")
        _old_pieces(block, 0, 21, pieces)
        if len(pieces) > MAX_PIECES:
            raise _too_many(member)
        more = block[504]
    _set_sparse(member, pieces, size)


def _old_pieces(block: bytes, at: int, count: int, pieces: list[tuple[int, int]]) -> None:
    """Append the pieces of a block, up to the first empty place."""
    for place in range(at, at + 24 * count, 24):
        if not block[place] and not block[place + 12]:
            return
        piece = block[place : place + 12], block[place + 12 : place + 24]
        pieces.append((_number(piece[0], "sparse map"), _number(piece[1], "sparse map")))


def _pax_sparse(stream: Stream, member: Member, pieces: list[tuple[int, int]]) -> None:
    """The forms 0.0, 0.1 and 1.0 of GNU tar, told by their records."""
    said = member.pax_headers
    size = said.get("GNU.sparse.realsize") or said.get("GNU.sparse.size")
    member.name = said.get("GNU.sparse.name") or member.name
    if said.get("GNU.sparse.major") == "1":
        pieces = _map_in_data(stream, member)
    elif said.get("GNU.sparse.map"):
        numbers = said["GNU.sparse.map"].split(",", 2 * MAX_PIECES)
        if len(numbers) > 2 * MAX_PIECES or len(numbers) % 2:
            raise _too_many(member)
        values = [_decimal(number, "sparse map") for number in numbers]
        pieces = list(zip(values[::2], values[1::2], strict=True))
    elif not pieces:
        return
    _set_sparse(member, pieces, _decimal(size, "size") if size else member.size)


def _map_in_data(stream: Stream, member: Member) -> list[tuple[int, int]]:
    """Form 1.0: a count and the numbers, a line each, in blocks before the data."""
    left = member.stored
    rest = b""
    values: list[int] = []
    wanted = 1
    while len(values) < wanted:
        block = stream.read(BLOCK)
        left -= BLOCK
        if len(block) < BLOCK or left < 0:
            raise LayerError(f"{member.name}: its sparse map is wrong")
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > BLOCK:
            raise LayerError(f"{member.name}: its sparse map is wrong")
        if not values and lines:
            wanted = 1 + 2 * _decimal(_decode(lines[0]), "sparse map")
            if wanted > 2 * MAX_PIECES:
                raise _too_many(member)
        values += [_decimal(_decode(line), "sparse map") for line in lines[: wanted - len(values)]]
    member.stored = left
    return list(zip(values[1::2], values[2::2], strict=True))


def _set_sparse(member: Member, pieces: list[tuple[int, int]], size: int) -> None:
    """Check the map: in order, apart, within the file, and of no more than the data there is."""
    end = total = 0
    for offset, count in pieces:
        if offset < end or count < 0 or offset + count > size:
            raise LayerError(f"{member.name}: its sparse map is wrong")
        end, total = offset + count, total + count
    if total > member.stored:
        raise LayerError(f"{member.name}: its sparse map is of more than there is")
    member.sparse, member.size = pieces, size


def _too_many(member: Member) -> LayerError:
    return LayerError(f"{member.name}: a sparse file of more than {MAX_PIECES} pieces")


# -- fields ------------------------------------------------------------------------------------------------------------


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes, what: str) -> int:
    """Octal digits, or GNU's base 256 where the first bit is set."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise LayerError(f"layer tar is broken: the {what} in a header is no number") from None


def _decimal(text: str, what: str) -> int:
    """Decimal digits, as PAX has them."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
        raise LayerError(f"layer tar is broken: the {what} in a header is no number")
    return int(text)


def _signed_sum(block: bytes) -> int:
    """What writers with signed characters give as the checksum: some old ones do."""
    return sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + 8 * 32
