"""Parsers as those read them who write completion scripts, the reference and man pages."""

from __future__ import annotations

import argparse

__all__ = ["actions_of"]


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options and arguments of a parser, in order; argparse has no public way to them."""
    return parser._actions
