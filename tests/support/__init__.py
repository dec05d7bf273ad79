"""The building blocks of tests of real mounts; nothing here is mocked.

===============  ==========================================================================
module           concept
===============  ==========================================================================
``namespace``    the private mount namespace that the whole pytest process lives in
``hostfs``       tmpfs, ext4, xfs and btrfs to put layers on (loop-mounted images)
``layers``       builders of layers in the kernel overlayfs's own format
``trees``        what a tree *is*: a snapshot of everything semantics.md compares
``mounts``       the implementations under test behind one call
``users``        doing something as an ordinary user
``ops``          random operations, run against any directory, with comparable results
===============  ==========================================================================
"""
