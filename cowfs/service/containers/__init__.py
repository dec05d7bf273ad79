"""Containers: a snapshot of the store, an OCI bundle that runc or crun runs, and a supervisor that outlives the daemon.

Reading order: ``container`` (the record), ``manager`` (the verbs), ``supervisor`` and ``streams`` (the process that holds input,
output and exit status), ``bundle`` (the runtime's configuration).
"""
