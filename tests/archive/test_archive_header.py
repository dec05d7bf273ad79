"""The header codec: every field round-trips, every malformed one is refused."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, strategies as st

from cowfs.archive import header
from cowfs.errors import InvalidArgument

NAMES = st.binary(min_size=1, max_size=300).filter(lambda name: b"\0" not in name and not name.endswith(b"/"))
TIMES = st.integers(-(1 << 70), 1 << 70)


def _members(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024)), encoding="utf-8", errors="surrogateescape") as archive:
        return archive.getmembers()


@given(
    NAMES,
    st.integers(0, 0o7777),
    st.integers(0, header.MAX_ID),
    st.integers(0, header.MAX_ID),
    st.integers(-(1 << 62), 1 << 62),
)
def test_what_is_encoded_is_read_back(name: bytes, mode: int, uid: int, gid: int, mtime: int) -> None:
    from cowfs.archive.compress import Source
    from cowfs.archive.reader import Reader

    class Bytes(Source):
        data = header.encode(name, header.REGULAR, mode=mode, uid=uid, gid=gid, size=0, mtime=mtime)

        def next_chunk(self) -> bytes:
            data, self.data = self.data[:100], self.data[100:]
            return data

    [member] = list(Reader(Bytes()))
    assert (member.name, member.mode, member.uid, member.gid, member.mtime) == (name, mode, uid, gid, mtime)


@given(st.text(min_size=1, max_size=200).filter(lambda text: "\0" not in text and not text.endswith("/")))
def test_tarfile_reads_the_names_we_write(name: str) -> None:
    data = header.encode(
        name.encode("utf-8", "surrogatepass"), header.REGULAR, mode=0o644, uid=1, gid=2, size=0, mtime=0
    )
    [info] = _members(data)
    assert info.name.encode("utf-8", "surrogateescape") == name.encode("utf-8", "surrogatepass")


def test_a_plain_entry_needs_no_pax_header() -> None:
    assert len(header.encode(b"usr/bin/x", header.REGULAR, mode=0o755, uid=0, gid=0, size=5, mtime=7 * 10**9)) == 512


def test_a_name_of_255_bytes_with_a_slash_in_the_middle_is_plain_ustar() -> None:
    name = b"d" * 155 + b"/" + b"f" * 99
    block = header.encode(name, header.REGULAR, mode=0, uid=0, gid=0, size=0, mtime=0)
    assert len(block) == 512
    assert header.parse_block(block).name == name


@given(TIMES)
def test_times_keep_every_nanosecond(nanos: int) -> None:
    assert header.parse_time(header.format_time(nanos)) == nanos


@pytest.mark.parametrize(
    ("text", "nanos"),
    [
        (b"0", 0),
        (b"1.5", 1_500_000_000),
        (b"-1.5", -1_500_000_000),
        (b"-0.000000001", -1),
        (b"1.0000000019", 1_000_000_001),
        (b"-1.0000000001", -1_000_000_001),
        (b"9223372037", 9_223_372_037_000_000_000),
    ],
)
def test_pax_times(text: bytes, nanos: int) -> None:
    assert header.parse_time(text) == nanos


@pytest.mark.parametrize("text", [b"", b"-", b"1e5", b"+1", b" 1", b"1_0", b"0x1", b"1.2.3", b"nan", b"9" * 40])
def test_a_time_that_is_no_number_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgument, match="time"):
        header.parse_time(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b"   644 \0", 0o644),
        (b"\0" * 8, 0),
        (b"        ", 0),
        (b"77777777", 0o77777777),
        (b"\x80" + bytes(6) + b"\x05", 5),
        (b"\x80" + b"\xff" * 7, (1 << 56) - 1),
        (b"\xff" * 8, -1),
    ],
)
def test_numbers(field: bytes, value: int) -> None:
    assert header.number(field, "field") == value


@pytest.mark.parametrize(
    "field", [b"0o17\0\0\0\0", b"1_0\0\0\0\0\0", b"-7\0\0\0\0\0\0", b"89\0\0\0\0\0\0", b"abc\0\0\0\0\0"]
)
def test_a_field_that_is_no_number_is_refused(field: bytes) -> None:
    with pytest.raises(InvalidArgument):
        header.number(field, "field")


@given(st.integers(0, 511), st.integers(1, 255))
def test_one_wrong_byte_is_noticed(position: int, change: int) -> None:
    block = bytearray(header.encode(b"name", header.REGULAR, mode=0o644, uid=5, gid=6, size=7, mtime=0))
    block[position] ^= change
    try:
        member = header.parse_block(bytes(block))
    except InvalidArgument:
        return
    # only the checksum's own spelling may differ without changing what the header says
    assert 148 <= position < 156
    assert member.name == b"name"


def test_signed_checksums_of_old_writers_are_accepted() -> None:
    block = bytearray(header.encode(b"caf\xe9".ljust(4), header.REGULAR, mode=0, uid=0, gid=0, size=0, mtime=0)[-512:])
    block[:5] = b"caf\xe9\0"
    block[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % signed
    assert header.parse_block(bytes(block)).name == b"caf\xe9"


@pytest.mark.parametrize(
    "data",
    [
        b"5 a=\n",
        b"30 path=x\n",
        b"x path=x\n",
        b" path=x\n",
        b"9 path=xx",
        b"7 pathx\n",
        b"5 =x\n",
        b"-9 path=x\n",
        b"1 ",
    ],
)
def test_malformed_pax_records_are_refused(data: bytes) -> None:
    if data == b"5 a=\n":
        assert header.parse_pax(data) == [(b"a", b"")]
        return
    with pytest.raises(InvalidArgument, match="PAX"):
        header.parse_pax(data)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=20).filter(lambda k: b"=" not in k), st.binary(max_size=200))))
def test_pax_records_round_trip(records: list[tuple[bytes, bytes]]) -> None:
    assert header.parse_pax(b"".join(header._pax_record(key, value) for key, value in records)) == records
