"""A disk that is full while saving: said in words, and what was saved before is untouched."""

import subprocess
import sys
import textwrap
from pathlib import Path

from lamina.engine import checkpoint

FILL = """
    import resource, signal, sys
    from pathlib import Path
    import torch
    from lamina.engine import checkpoint
    from lamina.errors import CheckpointError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoint.save(Path(sys.argv[1]), {"state": {"version": 2}}, {"learner": {"big": torch.zeros(100_000)}})
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_is_said_and_costs_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"state": {"version": 1}}, {})
    command = [sys.executable, "-c", textwrap.dedent(FILL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "checkpoint 2 cannot be written" in done.stdout
    assert "lamina resume" in done.stdout
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert (loaded.number, loaded.documents["state"]) == (1, {"version": 1})
