"""The only ctypes, ioctl and raw system calls of cowfs.

Every function here is one kernel facility with a Python signature: descriptors are ints, names
are ``bytes``, failures are :class:`OSError` with the kernel's errno. Nothing here knows what a
layer is. Sub-modules: :mod:`files` (opening, copying, space), :mod:`xattr`, :mod:`mounts`,
:mod:`host` (what this process may do).
"""
