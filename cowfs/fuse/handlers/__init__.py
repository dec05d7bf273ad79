"""One handler an operation: :mod:`names`, :mod:`data`, and :mod:`passthrough` for its own way of opening."""
