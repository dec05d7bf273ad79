"""The verbs that a mount's server answers: :mod:`basic` (look, limit, unmount), :mod:`live` (snapshot and rollback),
:mod:`compact`, :mod:`restack` (other layers beneath)."""
