"""The verbs of :class:`cowfs.Store` by topic: each a signature, its documentation, and one call of a service.

Rule: this package decides nothing, and no verb calls another; :mod:`cowfs.store.services` has the services that do the work.
"""
