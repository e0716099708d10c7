"""Runs: one method on one stream, in a directory of its own."""

from lamina.runs.directory import read_record, runs_within, with_whole_paths
from lamina.runs.lifecycle import Measured, create, evaluate, resume, train_task
from lamina.runs.setup import Setup, Watch, check_stream, load_config, load_data, make_stream, open_source
from lamina.runs.signals import stop_on_signals

__all__ = [
    "Measured",
    "Setup",
    "Watch",
    "check_stream",
    "create",
    "evaluate",
    "load_config",
    "load_data",
    "make_stream",
    "open_source",
    "read_record",
    "resume",
    "runs_within",
    "stop_on_signals",
    "train_task",
    "with_whole_paths",
]
