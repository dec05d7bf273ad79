"""The wire: sizes, round trips, and what truncation and junk do. No mount is needed."""

from __future__ import annotations

import errno
import re
import struct
from typing import Any

import pytest
from hypothesis import given, strategies as st

from cowfs.errors import Unsupported
from cowfs.fuse import abi, codec, handshake

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
NAME = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name and b"/" not in name)
STRUCTS = sorted(abi.SIZES)


def build(opcode: int, body: bytes, *, unique: int = 7, nodeid: int = 9, extensions: int = 0) -> bytes:
    """A whole request."""
    return abi.IN_HEADER.pack(40 + len(body), opcode, unique, nodeid, 1, 2, 3, extensions, 0) + body


def values(layout: struct.Struct) -> st.SearchStrategy[tuple[object, ...]]:
    """Values that fit each field of a struct."""
    kinds = {"Q": U64, "q": st.integers(-(2**63), 2**63 - 1), "I": U32, "i": st.integers(-(2**31), 2**31 - 1),
             "H": st.integers(0, 65535)}  # fmt: skip
    fields: list[st.SearchStrategy[Any]] = []
    digits = ""
    for char in layout.format[1:]:
        if char.isdigit():
            digits += char
            continue
        if char == "s":
            fields.append(st.binary(min_size=int(digits), max_size=int(digits)))
        elif char != "x":
            fields.append(kinds[char])
        digits = ""
    return st.tuples(*fields)


#: Bytes of each field, in the order of the kernel's header (include/uapi/linux/fuse.h; offsetof and sizeof as a C compiler
#: gave them for 7.38, later fields from the header's own comments). Trailing ``x`` are spare bytes.
LAYOUT = {
    "IN_HEADER": "4 4 8 8 4 4 4 2 2", "OUT_HEADER": "4 4 8", "ATTR": "8 8 8 8 8 8 4 4 4 4 4 4 4 4 4 4",
    "ENTRY_OUT": "8 8 8 8 4 4", "ATTR_OUT": "8 4 4", "FORGET_IN": "8", "FORGET_ONE": "8 8", "BATCH_FORGET_IN": "4 4",
    "GETATTR_IN": "4 4 8", "MKNOD_IN": "4 4 4 4", "MKDIR_IN": "4 4", "RENAME_IN": "8", "RENAME2_IN": "8 4 4", "LINK_IN": "8",
    "SETATTR_IN": "4 4 8 8 8 8 8 8 4 4 4 4 4 4 4 4", "OPEN_IN": "4 4", "CREATE_IN": "4 4 4 4", "OPEN_OUT": "8 4 4",
    "RELEASE_IN": "8 4 4 8", "FLUSH_IN": "8 4 4 8", "READ_IN": "8 8 4 4 8 4 4", "WRITE_IN": "8 8 4 4 8 4 4", "WRITE_OUT": "4 4",
    "STATFS_OUT": "8 8 8 8 8 4 4 4 4 24x", "FSYNC_IN": "8 4 4", "SETXATTR_IN": "4 4 4 4", "SETXATTR_COMPAT_IN": "4 4",
    "GETXATTR_IN": "4 4", "GETXATTR_OUT": "4 4", "LK_IN": "8 8 8 8 4 4 4 4", "ACCESS_IN": "4 4", "INIT_IN": "4 4 4 4 4 44x",
    "INIT_COMPAT_IN": "4 4 4 4", "INIT_OUT": "4 4 4 4 2 2 4 4 2 2 4 4 2 22x", "INTERRUPT_IN": "8", "BMAP_IN": "8 4 4",
    "IOCTL_IN": "8 4 4 8 4 4", "POLL_IN": "8 8 4 4", "FALLOCATE_IN": "8 8 8 4 4", "DIRENT": "8 8 4 4",
    "DIRENTPLUS": "8 8 8 8 4 4 88 8 8 4 4", "LSEEK_IN": "8 8 4 4", "LSEEK_OUT": "8", "COPY_FILE_RANGE_IN": "8 8 8 8 8 8 8",
    "COPY_FILE_RANGE_OUT": "8", "SYNCFS_IN": "8", "STATX_IN": "4 4 8 4 4", "NOTIFY_INVAL_INODE_OUT": "8 8 8",
    "NOTIFY_INVAL_ENTRY_OUT": "8 4 4", "NOTIFY_DELETE_OUT": "8 8 4 4", "NOTIFY_PRUNE_OUT": "4 4 8", "BACKING_MAP": "4 4 8",
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTS)
def test_every_field_is_where_the_kernel_has_it(name: str) -> None:
    """Each field in turn is filled with ones: exactly the kernel's bytes of it are."""
    layout: struct.Struct = getattr(abi, name)
    kinds = re.findall(r"\d*[a-zA-Z]", re.sub(r"\d*x", "", layout.format)[1:])
    singles = [kind for item in kinds for kind in ([item] if item.endswith("s") else item[-1] * int(item[:-1] or 1))]
    sizes = [part for part in LAYOUT[name].split() if not part.endswith("x")]
    assert len(singles) == len(sizes)
    at = 0
    for number, size in enumerate(map(int, sizes)):
        ones = [bytes(88) if kind.endswith("s") else 0 for kind in singles]
        ones[number] = (
            b"\xff" * size
            if singles[number].endswith("s")
            else -1
            if singles[number].islower()
            else (1 << 8 * size) - 1
        )
        assert layout.pack(*ones) == bytes(at) + b"\xff" * size + bytes(layout.size - at - size)
        at += size
    spare = LAYOUT[name].split()[-1]
    assert layout.size == at + (int(spare[:-1]) if spare.endswith("x") else 0)


def test_every_struct_that_is_used_has_its_size_asserted() -> None:
    found = {name for name, value in vars(abi).items() if isinstance(value, struct.Struct)}
    assert found - {"HEAD", "CALLER"} == set(abi.SIZES) == set(LAYOUT)


def test_short_headers_are_the_front_of_the_whole_one() -> None:
    whole = abi.IN_HEADER.pack(1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert abi.HEAD.unpack_from(whole) == (1, 2, 3, 4)
    assert abi.CALLER.unpack_from(whole, abi.CALLER_AT) == (5, 6, 7, 8)


def test_every_opcode_has_a_shape_but_those_never_served() -> None:
    unread = {"NOTIFY_REPLY", "SETUPMAPPING", "REMOVEMAPPING"}
    assert {abi.NAMES[opcode] for opcode in codec.SHAPES} == set(abi.OPCODES) - unread


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, tuple[int, ...], tuple[bytes, ...], bytes]:
    """Opcode, fields, names, data of some valid request."""
    opcode = draw(st.sampled_from(sorted(codec.SHAPES)))
    shape = codec.SHAPES[opcode]
    fields = draw(values(shape.body)) if shape.body else ()
    names = tuple(draw(NAME) for _ in range(shape.names))
    data = draw(st.binary(max_size=200)) if shape.data else b""
    return opcode, fields, names, data  # type: ignore[return-value]


def encode(opcode: int, fields: tuple[int, ...], names: tuple[bytes, ...], data: bytes) -> bytes:
    body = codec.SHAPES[opcode].body
    return build(opcode, (body.pack(*fields) if body else b"") + b"".join(name + b"\0" for name in names) + data)


@given(requests())
def test_every_request_round_trips(request: tuple[int, tuple[int, ...], tuple[bytes, ...], bytes]) -> None:
    opcode, fields, names, data = request
    parsed = codec.parse(memoryview(encode(*request)))
    assert (parsed.opcode, parsed.unique, parsed.nodeid) == (opcode, 7, 9)
    assert (parsed.uid, parsed.gid, parsed.pid) == (1, 2, 3)
    assert (parsed.fields, parsed.names, bytes(parsed.data)) == (fields, names, data)


@given(requests())
def test_the_bounds_let_every_valid_request_pass(
    request: tuple[int, tuple[int, ...], tuple[bytes, ...], bytes],
) -> None:
    low, high = codec.bounds(1 << 20)
    assert low[request[0]] <= len(encode(*request)) <= high[request[0]]


@given(requests(), st.data())
def test_a_truncated_request_is_refused(
    request: tuple[int, tuple[int, ...], tuple[bytes, ...], bytes], data: st.DataObject
) -> None:
    opcode, fields, names, _ = request
    whole = encode(opcode, fields, names, b"")
    if len(whole) == 40:
        return
    kept = data.draw(st.integers(40, len(whole) - 1))
    short = bytearray(whole[:kept])
    short[0:4] = kept.to_bytes(4, "little")
    with pytest.raises(OSError) as caught:
        codec.parse(memoryview(short))
    assert caught.value.errno == errno.EINVAL


@given(requests(), st.binary(min_size=1, max_size=64))
def test_trailing_junk_is_refused_where_no_data_may_follow(
    request: tuple[int, tuple[int, ...], tuple[bytes, ...], bytes], junk: bytes
) -> None:
    opcode, fields, names, _ = request
    if codec.SHAPES[opcode].data:
        return
    with pytest.raises(OSError) as caught:
        codec.parse(memoryview(encode(opcode, fields, names, junk)))
    assert caught.value.errno == errno.EINVAL
    if not names:
        low, high = codec.bounds(1 << 20)
        assert low[opcode] == high[opcode]  # so the session refuses it by its length


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_do_worse_than_an_error(junk: bytes) -> None:
    view = memoryview(junk)
    try:
        codec.parse(view)
    except (OSError, codec.ProtocolError):
        pass
    assert isinstance(codec.describe(view), str)


@given(st.integers(0, 100), st.integers(0, 100))
def test_a_length_that_is_not_the_frame_s_ends_the_session(says: int, has: int) -> None:
    frame = bytearray(build(abi.GETATTR, bytes(max(0, has - 40)))[:has])
    if has >= 4:
        frame[0:4] = says.to_bytes(4, "little")
    if has >= 40 and says == has:
        return
    with pytest.raises(codec.ProtocolError):
        codec.parse(memoryview(frame))


def test_extensions_that_were_not_negotiated_are_refused() -> None:
    with pytest.raises(OSError) as caught:
        codec.parse(memoryview(build(abi.MKDIR, abi.MKDIR_IN.pack(0, 0) + b"a\0" + bytes(8), extensions=1)))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("raw", "code"),
    [(b"\0", errno.EINVAL), (b"a", errno.EINVAL), (b"a\0b\0", errno.EINVAL), (b"a/b\0", errno.EINVAL),
     (b"/\0", errno.EINVAL), (b"a" * 256 + b"\0", errno.ENAMETOOLONG)],
)  # fmt: skip
def test_a_bad_name_has_its_errno(raw: bytes, code: int) -> None:
    with pytest.raises(OSError) as caught:
        codec.name(memoryview(raw), 0, len(raw))
    assert caught.value.errno == code


@given(NAME, NAME)
def test_two_names_are_taken_apart(first: bytes, second: bytes) -> None:
    raw = memoryview(first + b"\0" + second + b"\0")
    assert codec.two_names(raw, 0, len(raw)) == (first, second)


@pytest.mark.parametrize("raw", [b"", b"a\0", b"a\0\0", b"\0b\0", b"a\0b", b"a\0b\0c\0", b"a/\0b\0"])
def test_two_bad_names_are_refused(raw: bytes) -> None:
    with pytest.raises(OSError) as caught:
        codec.two_names(memoryview(raw), 0, len(raw))
    assert caught.value.errno == errno.EINVAL


def test_a_link_target_of_the_longest_path_passes_and_a_longer_one_does_not() -> None:
    for length, code in ((4095, 0), (4096, errno.ENAMETOOLONG)):
        raw = memoryview(b"l\0" + b"x" * length + b"\0")
        if not code:
            assert codec.name_and_text(raw, 0, len(raw), 4095) == (b"l", b"x" * length)
            continue
        with pytest.raises(OSError) as caught:
            codec.name_and_text(raw, 0, len(raw), 4095)
        assert caught.value.errno == code


@given(NAME, st.binary(max_size=100))
def test_an_xattr_value_must_have_the_size_it_claims(name: bytes, value: bytes) -> None:
    raw = memoryview(name + b"\0" + value)
    found, data = codec.name_and_data(raw, 0, len(raw), len(value))
    assert (found, bytes(data)) == (name, value)
    with pytest.raises(OSError) as caught:
        codec.name_and_data(raw, 0, len(raw), len(value) + 1)
    assert caught.value.errno == errno.EINVAL


def test_an_xattr_name_that_is_too_long_is_erange() -> None:
    raw = memoryview(b"n" * 256 + b"\0v")
    with pytest.raises(OSError) as caught:
        codec.name_and_data(raw, 0, len(raw), 1)
    assert caught.value.errno == errno.ERANGE


# -- replies ----------------------------------------------------------------------------------

ATTR = bytes(range(88))


def test_every_reply_says_its_own_length() -> None:
    replies = [codec.ok(1), codec.error(1, errno.ENOENT), codec.payload(1, b"abc"), codec.entry(1, 2, 3, ATTR),
               codec.negative(1), codec.attributes(1, ATTR), codec.notify_inval_inode(5), codec.notify_prune([1, 2]),
               codec.notify_inval_entry(1, b"n"), codec.notify_delete(1, 2, b"n"),
               codec.notify_inc_epoch()]  # fmt: skip
    for reply in replies:
        assert abi.OUT_HEADER.unpack_from(reply)[0] == len(reply)


def test_an_entry_holds_its_node_and_attributes() -> None:
    reply = codec.entry(1, 2, 3, ATTR)
    assert abi.ENTRY_OUT.unpack_from(reply, 16) == (2, 3, codec.FOREVER, codec.FOREVER, 0, 0)
    assert reply[56:] == ATTR


def test_a_negative_entry_has_node_0_and_is_remembered() -> None:
    node, _, valid, *_ = abi.ENTRY_OUT.unpack_from(codec.negative(1), 16)
    assert node == 0
    assert valid == codec.FOREVER


@pytest.mark.parametrize("code", [0, -1, 512, 100000])
def test_what_is_no_errno_becomes_eio(code: int) -> None:
    assert abi.OUT_HEADER.unpack(codec.error(9, code)) == (16, -errno.EIO, 9)


def test_look_ups_of_a_reply_are_found_again() -> None:
    assert codec.looked_up(abi.LOOKUP, codec.entry(1, 42, 0, ATTR)) == [42]
    assert codec.looked_up(abi.LOOKUP, codec.negative(1)) == []
    assert codec.looked_up(abi.LOOKUP, codec.error(1, errno.ENOENT)) == []
    assert codec.looked_up(abi.GETATTR, codec.attributes(1, ATTR)) == []
    listing = b""
    for node, name in ((0, b"."), (7, b"seven"), (8, b"eightlet")):
        listing += abi.DIRENTPLUS.pack(node, 0, 0, 0, 0, 0, ATTR, node or 1, 1, len(name), 4)
        listing += name + bytes(-len(name) % 8)
    assert codec.looked_up(abi.READDIRPLUS, codec.payload(1, listing)) == [7, 8]


# -- INIT -------------------------------------------------------------------------------------


def init(minor: int = 45, flags: int = (1 << 43) - 1, major: int = 7) -> memoryview:
    return memoryview(abi.INIT_IN.pack(major, minor, 131072, flags & 0xFFFFFFFF, flags >> 32))


def test_init_never_asks_for_atomic_o_trunc() -> None:
    for mode in (handshake.CACHED, handshake.WRITEBACK, handshake.PASSTHROUGH):
        _, agreed = handshake.negotiate(init(), mode=mode)
        assert agreed is not None
        assert not agreed.has("ATOMIC_O_TRUNC")
        assert agreed.has("HANDLE_KILLPRIV_V2")


def test_init_asks_only_for_what_the_kernel_offers() -> None:
    offered = abi.INIT_FLAGS["INIT_EXT"] | abi.INIT_FLAGS["NO_OPEN_SUPPORT"] | abi.INIT_FLAGS["MAX_PAGES"]
    body, agreed = handshake.negotiate(init(flags=offered))
    assert agreed is not None
    assert agreed.flags == offered
    fields = abi.INIT_OUT.unpack(body)
    assert fields[3] | fields[10] << 32 == offered


def test_passthrough_excludes_writeback_and_no_open() -> None:
    body, agreed = handshake.negotiate(init(), mode=handshake.PASSTHROUGH)
    assert agreed is not None
    assert agreed.has("PASSTHROUGH")
    assert not agreed.has("WRITEBACK_CACHE")
    assert not agreed.has("NO_OPEN_SUPPORT")
    assert abi.INIT_OUT.unpack(body)[11] == 1


def test_passthrough_without_the_kernel_s_support_becomes_cached() -> None:
    _, agreed = handshake.negotiate(init(flags=abi.INIT_FLAGS["NO_OPEN_SUPPORT"]), mode=handshake.PASSTHROUGH)
    assert agreed is not None
    assert agreed.mode == handshake.CACHED
    assert agreed.has("NO_OPEN_SUPPORT")


@pytest.mark.parametrize(("asked", "given"), [(1 << 20, 1 << 20), (1 << 24, 1 << 20), (4096, 4096), (1, 4096)])
def test_max_write_is_in_pages_and_at_most_a_mebibyte(asked: int, given: int) -> None:
    body, agreed = handshake.negotiate(init(), max_write=asked)
    assert agreed is not None
    assert agreed.max_write == given
    fields = abi.INIT_OUT.unpack(body)
    assert (fields[6], fields[8]) == (given, given // 4096)


def test_a_kernel_that_is_too_old_is_named() -> None:
    with pytest.raises(Unsupported, match=r"7\.30.*Linux 5\.4"):
        handshake.negotiate(init(minor=30))


def test_a_kernel_of_a_newer_major_version_asks_again() -> None:
    body, agreed = handshake.negotiate(init(major=8))
    assert agreed is None
    assert abi.INIT_OUT.unpack(body)[:2] == (7, abi.MINOR)


@given(st.binary(max_size=80))
def test_a_garbled_init_is_refused_or_agreed_on(junk: bytes) -> None:
    try:
        handshake.negotiate(memoryview(junk))
    except (codec.ProtocolError, Unsupported):
        pass


def test_every_feature_is_decided_with_a_reason() -> None:
    for _, why in handshake.WANTED.values():
        assert why
    assert all(handshake.UNWANTED.values())
