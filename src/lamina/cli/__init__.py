"""The `lamina` command."""

from lamina.cli.main import app, main

__all__ = ["app", "main"]
