"""The index of a store: its snapshots, and the place of each file.

Reading order: :mod:`database` (SQLite: snapshots, tags, transactions), :mod:`directory` (the record of one directory),
:mod:`scan` (records from a layer), :mod:`compare` (two trees), :mod:`mounted` (a tree as a view needs it), :mod:`spool`
(records that wait on disk).
"""
