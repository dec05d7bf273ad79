"""The verbs of the command that work on a store."""
