"""The container of a torch file: a zip archive whose members lie in it as they are, read in place.

Every place and size is checked against the file before it is believed: nothing overlaps, nothing is compressed, no name
is there twice, and no list is longer than a file of torch's could have.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from mlxchat.errors import DataError

_END, _END64, _LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ENTRY, _LOCAL = b"PK\1\2", b"PK\3\4"
_MOST_DIRECTORY_BYTES = 16 << 20
_LONGEST_COMMENT = 1 << 16
_AGAIN = "Fetch or copy it again."
# What torch.save wrote before 2020 begins with this number, pickled.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True)
class Member:
    """A file inside of the archive."""

    name: str
    start: int
    """Where its content begins in the archive, in bytes."""
    bytes: int
    crc: int
    """CRC-32 of the content; 0: none was computed."""


def list_members(file: BinaryIO, where: str) -> dict[str, Member]:
    """Return the members of a torch file by name, without the folder that all of them lie in.

    Args:
        file: open at any place.
        where: its name, for messages.

    Raises:
        DataError: it is no such archive, or a damaged or made-up one.
    """
    size = file.seek(0, 2)
    _check_beginning(file, where)
    count, start, length = _directory(file, size, where)
    if length > _MOST_DIRECTORY_BYTES or start + length > size:
        raise DataError(f"{where} is damaged: the list of what it holds lies outside of it. {_AGAIN}")
    file.seek(start)
    listing = file.read(length)
    found: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        if listing[at : at + 4] != _ENTRY or len(listing) < at + 46:
            raise DataError(f"{where} is damaged: the list of what it holds is shorter than it says. {_AGAIN}")
        flags, method, crc, packed, plain, names, extra, comment, header = struct.unpack(
            "<HH4xIIIHHH8xI", listing[at + 8 : at + 46]
        )
        raw = listing[at + 46 : at + 46 + names]
        fields = listing[at + 46 + names : at + 46 + names + extra]
        at += 46 + names + extra + comment
        name = raw.decode("utf-8", "replace")
        plain, packed, header = _wide(fields, plain, packed, header, where)
        if flags & 1 or method != 0 or packed != plain:
            raise DataError(
                f"{where} cannot be read: {name} is compressed or encrypted, which torch.save never does. Save it again"
            )
        if name in found:
            raise DataError(f"{where} cannot be read: it holds {name} twice, which torch.save never does")
        found[name] = Member(name, _content_start(file, header, raw, start, plain, where), plain, crc)
    _check_overlaps(list(found.values()), where)
    return _without_folder(found, where)


def _check_beginning(file: BinaryIO, where: str) -> None:
    file.seek(0)
    beginning = file.read(512)
    if beginning[:4] in (_LOCAL, _END):
        return
    if beginning.startswith(b"version https://git-lfs"):
        reason = "is a pointer of Git LFS, not the file itself. Get that with: git lfs pull"
    elif beginning.startswith(_LEGACY) or beginning[257:262] == b"ustar":
        reason = (
            "was written in the form that torch.save had before 2020 (no zip archive). Write it anew with torch: "
            "torch.save(torch.load(OLD, weights_only=True), NEW)"
        )
    elif not beginning:
        reason = f"is empty. {_AGAIN}"
    else:
        reason = f"is no file of torch.save's: expected a zip archive. {_AGAIN}"
    raise DataError(f"{where} {reason}")


def _directory(file: BinaryIO, size: int, where: str) -> tuple[int, int, int]:
    """Return how many members there are, where their list begins, and its length."""
    tail_start = max(0, size - _LONGEST_COMMENT - 22)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + 22:
        raise DataError(
            f"{where} is cut off: it has {size:,} bytes, and the end of the archive is not among them. {_AGAIN}"
        )
    count, length, start = struct.unpack("<HII", tail[at + 10 : at + 20])
    locator = tail[at - 20 : at] if at >= 20 else b""
    if locator[:4] == _LOCATOR64:
        (place,) = struct.unpack("<Q", locator[8:16])
        if place + 56 > size:
            raise DataError(f"{where} is damaged: its end points outside of it. {_AGAIN}")
        file.seek(place)
        record = file.read(56)
        if record[:4] != _END64:
            raise DataError(f"{where} is damaged: its end is not where it says. {_AGAIN}")
        count, length, start = struct.unpack("<QQQ", record[32:56])
    return count, start, length


def _wide(fields: bytes, plain: int, packed: int, header: int, where: str) -> tuple[int, int, int]:
    """Return the three numbers, those that do not fit into 32 bits from the extra field (zip64)."""
    wanted = [index for index, value in enumerate((plain, packed, header)) if value == 0xFFFFFFFF]
    values = [plain, packed, header]
    at = 0
    while wanted and at + 4 <= len(fields):
        tag, length = struct.unpack("<HH", fields[at : at + 4])
        if tag == 1 and length >= 8 * len(wanted) and at + 4 + length <= len(fields):
            for place, index in enumerate(wanted):
                (values[index],) = struct.unpack("<Q", fields[at + 4 + 8 * place : at + 12 + 8 * place])
            return values[0], values[1], values[2]
        at += 4 + length
    if wanted:
        raise DataError(f"{where} is damaged: a size is missing. {_AGAIN}")
    return plain, packed, header


def _content_start(file: BinaryIO, header: int, raw: bytes, end: int, length: int, where: str) -> int:
    file.seek(min(header, end))
    local = file.read(30)
    if len(local) < 30 or local[:4] != _LOCAL:
        raise DataError(f"{where} is damaged: a member is not where its list says. {_AGAIN}")
    names, extra = struct.unpack("<HH", local[26:30])
    if file.read(names) != raw:
        raise DataError(f"{where} is damaged: a member has two names. {_AGAIN}")
    start = int(header + 30 + names + extra)
    if start + length > end:
        raise DataError(f"{where} is cut off or damaged: a member reaches beyond the end of the archive. {_AGAIN}")
    return start


def _check_overlaps(members: list[Member], where: str) -> None:
    end = 0
    for member in sorted(members, key=lambda each: (each.start, each.bytes)):
        if member.start < end:
            raise DataError(f"{where} cannot be read: {member.name} lies over another member")
        end = member.start + member.bytes


def _without_folder(members: dict[str, Member], where: str) -> dict[str, Member]:
    folders = {name.split("/", 1)[0] for name in members}
    if len(folders) != 1 or any("/" not in name for name in members):
        raise DataError(f"{where} is no file of torch.save's: its members do not lie in one folder")
    return {name.split("/", 1)[1]: member for name, member in members.items()}
