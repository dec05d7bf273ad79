"""One mount and its server process.

Reading order: :mod:`request` (the record that describes a mount), :mod:`client` (the side that asks), :mod:`prefork` and
:mod:`server` (the process behind a mount), :mod:`assemble` with :mod:`resources` and :mod:`index_view` (the view and the
session for a request), :mod:`protocol` (the control socket) and :mod:`verbs` (its verbs), :mod:`mountpoint`,
:mod:`holders`, :mod:`upper_state`, :mod:`volatile` and :mod:`switch_mark` (state beside an upper layer and a mount).
"""
