"""The verbs of :class:`cowfs.Store` by topic: each a signature, its documentation, and one call of a service.

Rule: nothing here decides anything, and no verb calls another; :mod:`cowfs.store.services` has who does the work.
"""
