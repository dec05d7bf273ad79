"""One command in namespaces of its own, confined to one tree. It knows no store: the caller says how the tree is mounted.

| module | holds |
|---|---|
| :mod:`~cowfs.sandbox.request` | what is asked for, checked before anything is made |
| :mod:`~cowfs.sandbox.process` | the processes around the command: who starts, ends and waits for whom |
| :mod:`~cowfs.sandbox.confine` | where the command finds itself, and what it may not do |
| :mod:`~cowfs.sandbox.beside` | the way into a sandbox that runs already |
| :mod:`~cowfs.sandbox.subids` | a user namespace with the many ids that an ordinary user may have |
| :mod:`~cowfs.sandbox.users` | users and groups by a tree's own files |
| :mod:`~cowfs.sandbox.terminal` | a pseudo-terminal between the user's and the command's |
"""
