"""The POSIX ACLs of an xattr, as far as inheritance needs them.

Source: include/uapi/linux/posix_acl_xattr.h (version 2; tag, permissions, id), and acl(5),
"OBJECT CREATION AND DEFAULT ACLs".
"""

from __future__ import annotations

import struct

_HEAD = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x04, 0x10, 0x20


def masked(acl: bytes, mode: int) -> bytes:
    """The access ACL of a new object: the default ACL, reduced to the permissions of ``mode``."""
    entries = [_ENTRY.unpack_from(acl, at) for at in range(_HEAD.size, len(acl), _ENTRY.size)]
    has_mask = any(tag == _MASK for tag, _, _ in entries)
    cut = {_USER_OBJ: mode >> 6, _OTHER: mode, (_MASK if has_mask else _GROUP_OBJ): mode >> 3}
    packed = [_ENTRY.pack(tag, perm & (cut[tag] & 7) if tag in cut else perm, who) for tag, perm, who in entries]
    return acl[: _HEAD.size] + b"".join(packed)
