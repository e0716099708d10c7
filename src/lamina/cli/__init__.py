"""The `lamina` command."""

from lamina.cli.commands import app, main

__all__ = ["app", "main"]
