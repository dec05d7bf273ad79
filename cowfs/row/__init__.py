"""Redirect on write: a partly written file of a lower layer keeps its changed blocks only.

Reading order: :mod:`map` (the format on disk), :mod:`chain` (reads through the levels), :mod:`file` (one redirect
file), :mod:`redirects` (all of a view), :mod:`writeback` (fsync), :mod:`readahead`, :mod:`rewrite` and :mod:`compact`
(back to plain files), :mod:`layer` (a layer as a driver sees it), :mod:`extents` (the arithmetic).
"""
