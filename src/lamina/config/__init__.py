"""The configuration of a run."""

from lamina.config.schema import *  # noqa: F403
