# Shortcuts; the README's two commands (./demo or ./test) need none of them.
PYTHON ?= $(firstword $(wildcard .venv/bin/python) python3)

.PHONY: bench bench-full
bench:  ## measure against the peers in under three minutes, write benchmarks/report/
	$(PYTHON) -m benchmarks --profile quick

bench-full:  ## the measured run of benchmarks/README.md, about half an hour
	$(PYTHON) -m benchmarks --profile full
