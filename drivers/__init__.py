"""cowfs's own backends, installed as the package `cowfs_drivers`. Each is found by its entry point, never by name."""
