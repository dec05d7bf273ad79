"""The instruments of the benchmarks: trees, peers, clocks, reports."""
