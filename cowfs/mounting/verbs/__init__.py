"""The verbs that a mount's server answers: :mod:`basic` (status, limit, unmount), :mod:`live` (snapshot and rollback),
:mod:`compact`, :mod:`restack` (other layers beneath)."""
