-- The index of a store: snapshots, tags, and the directory records that say which file lives where.
-- Format 1; what later formats add is in cowfs.index.database (MIGRATIONS). Times are nanoseconds since 1970; sizes bytes; digests 32 raw bytes of SHA-256.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,             -- driver, form, uuid, created
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE snapshots (
    num           INTEGER PRIMARY KEY AUTOINCREMENT,  -- the layer's number in directory records: never used again
    id            TEXT NOT NULL UNIQUE,               -- the driver's directory; survives the commit
    name          TEXT NOT NULL UNIQUE,               -- the key of an active one or a view, the name of a committed one
    kind          TEXT NOT NULL CHECK (kind IN ('active', 'view', 'committed')),
    parent        INTEGER REFERENCES snapshots (num),
    depth         INTEGER NOT NULL,                   -- layers beneath
    labels        TEXT NOT NULL,                      -- JSON object
    created       INTEGER NOT NULL,
    updated       INTEGER NOT NULL,
    limit_bytes   INTEGER,
    limit_inodes  INTEGER,
    base_bytes    INTEGER NOT NULL DEFAULT 0,         -- what the driver copied when it was made: not counted
    base_inodes   INTEGER NOT NULL DEFAULT 0,
    bytes         INTEGER,                            -- own usage; NULL until committed
    inodes        INTEGER,
    root_content  BLOB,                               -- the root entry, packed (cowfs.index.directory); NULL until committed
    root_storage  BLOB,
    diff_id       TEXT,                               -- 'sha256:...' of the uncompressed tar, where it came from one
    chain_id      TEXT,                               -- OCI image-spec, config.md "Layer ChainID"
    damage        TEXT                                -- set by check --repair: why it is in quarantine
);

CREATE INDEX snapshots_parent ON snapshots (parent);
CREATE INDEX snapshots_chain ON snapshots (chain_id) WHERE chain_id IS NOT NULL;

CREATE TABLE records (
    digest   BLOB PRIMARY KEY,
    children BLOB NOT NULL,             -- digests of the records this one points at, one after another
    data     BLOB NOT NULL
);

CREATE TABLE tags (
    name    TEXT PRIMARY KEY,
    target  INTEGER NOT NULL REFERENCES snapshots (num),
    config  TEXT NOT NULL,              -- the image's configuration, byte for byte; '' for a plain tree
    created INTEGER NOT NULL
) WITHOUT ROWID;

CREATE INDEX tags_target ON tags (target);
