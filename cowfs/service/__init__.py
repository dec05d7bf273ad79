"""The service: one daemon over a store, with Docker's API, and its monitoring.

Words: a **door** is a listening socket for clients (a unix socket, a TCP address, a socket of systemd's); an **exchange** is
one request and its answer; a **route** is a line of the API's table; a **supervisor** is the process that owns a
container's input, output and exit status.

Rules:

1. One process, a thread for each exchange in work, over the synchronous store. No door knows another; no handler
   knows which door a request came through; no handler of the API does more than translate.
2. The daemon alone holds no state: snapshots are in the store, events in its index, a container's
   state in files and its streams in a supervisor. So a kill of the daemon disturbs nothing.
3. A client costs its own connection only: sizes, times and numbers are bounded in :mod:`cowfs.service.http`.

Reading order: ``options``, ``daemon``, ``doors``, ``http``, ``api.routing``, then the modules of ``api``.
"""
