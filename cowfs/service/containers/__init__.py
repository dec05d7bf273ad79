"""Containers: a snapshot of the store, an OCI bundle that runc or crun runs, and a supervisor that outlives the daemon.

Reading order: ``container`` (what is recorded), ``manager`` (the verbs), ``supervisor`` and ``streams`` (the process that holds input,
output and exit status), ``bundle`` (what the runtime is told).
"""
