"""The format of the index file: its version, and the steps from each older one."""

from __future__ import annotations

import os

__all__ = ["APPLICATION_ID", "FORMAT", "LACKING", "MIGRATIONS", "first_schema"]

APPLICATION_ID = 0x636F7766  # "cowf"

MIGRATIONS: dict[int, str] = {
    # Format 1 had no such column: the numbers showed that a limit was shared, since only a live snapshot's child has such.
    1: """
ALTER TABLE snapshots ADD COLUMN shares_limit INTEGER NOT NULL DEFAULT 0;
UPDATE snapshots SET shares_limit = 1 WHERE EXISTS (
    SELECT 1 FROM snapshots AS p WHERE p.num = snapshots.parent
    AND snapshots.base_bytes = p.base_bytes - coalesce(p.bytes, 0)
    AND snapshots.base_inodes = p.base_inodes - coalesce(p.inodes, 0)
    AND p.labels LIKE '%"cowfs.snapshot-of"%');
""",
    2: """
-- Configurations that snapshots remember: one for all the snapshots of an image.
CREATE TABLE configs (
    digest TEXT PRIMARY KEY,            -- 'sha256:...' of the document: the id of the image
    data   TEXT NOT NULL                -- byte for byte
) WITHOUT ROWID;

-- the configuration of the image that it was made from, whatever becomes of that image's tag
ALTER TABLE snapshots ADD COLUMN config TEXT REFERENCES configs (digest);

-- which form of export gave diff_id (cowfs.archive.FORM); NULL: an archive did, or an older cowfs
ALTER TABLE snapshots ADD COLUMN diff_form INTEGER;
""",
    3: """
-- What happened, the newest cowfs.index.events.KEPT of it. seq grows without gaps: the newest is never deleted.
CREATE TABLE events (
    seq        INTEGER PRIMARY KEY,
    time       INTEGER NOT NULL,
    type       TEXT NOT NULL,           -- image, container, snapshot, mount, limit, store
    action     TEXT NOT NULL,
    actor      TEXT NOT NULL,           -- the key, name, tag or id that it happened to
    attributes TEXT NOT NULL            -- JSON object of strings
);
""",
}

FORMAT = 1 + len(MIGRATIONS)

LACKING = {
    1: "0 AS shares_limit, NULL AS config, NULL AS diff_form",
    2: "NULL AS config, NULL AS diff_form",
    3: "",
}


def first_schema() -> str:
    with open(os.path.join(os.path.dirname(__file__), "schema.sql"), encoding="utf-8") as file:
        return file.read()
