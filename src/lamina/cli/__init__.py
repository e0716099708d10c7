"""The `lamina` command."""

from lamina.cli.app import app, main

__all__ = ["app", "main"]
