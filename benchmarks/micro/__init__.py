"""Functions that one process can time by itself, run by pytest-benchmark: ``pytest benchmarks/micro --benchmark-only``.

No bars: a figure here means something beside the same figure of another commit, in one run (``--benchmark-compare``).
"""
