"""The command `cowfs`: the only place that prints or reads the environment.

Strategy: one table of verbs. Only the verb that was asked for is imported and gets a parser; `--help` and
`completion` walk the whole table. Errors become one line on standard error and the exit code of their class here,
at one of the two edges where errors are translated (the other is the FUSE session).
"""
