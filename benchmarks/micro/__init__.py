"""Functions that one process can time by itself, run by pytest-benchmark: ``pytest benchmarks/micro --benchmark-only``.

There are no bars: a figure has a meaning only beside the same figure of another commit, in one run (``--benchmark-compare``).
"""
