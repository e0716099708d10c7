"""Compare methods: a grid of runs, each done once, and one table of them with its uncertainty and its cost."""

from lamina.compare.study import Failure, Listed, Outcome, Study, Viewer

__all__ = ["Failure", "Listed", "Outcome", "Study", "Viewer"]
