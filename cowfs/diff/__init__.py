"""Differences: :mod:`changes` (paths of an upper layer against its lowers), :mod:`blocks` (blocks of files)."""
