"""Asked to stop, a run saves, says how to go on, and goes on to the same bits."""

import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.processes import Moment, assert_same_bits, finish, halt_at, lamina, look, small_run, start


def test_sigterm_and_sigint(tmp_path: Path, unbroken: Callable[[str], Path]) -> None:
    out = tmp_path / "run"
    arguments = small_run(out, "inflora", checkpoint_seconds=0.0)
    for number, phase, step in [(signal.SIGTERM, "train", 2), (signal.SIGINT, "evaluate", 0)]:
        process = start(*arguments)
        # In the first task, or, where the machine was too busy to look in time, in a later one.
        sights = (halt_at(process, out, Moment(task, phase, step)) for task in range(3))
        sight = next(found for found in sights if found is not None)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        code, _, err = finish(process)
        assert code == 130
        assert f"lamina resume {out}" in err
        assert "Traceback" not in err
        now = look(out)
        assert now is not None
        assert now.saving is None
        assert (now.task, now.phase) == (sight.task, sight.phase)
        if phase == "train":
            assert now.number > sight.number, "what was learnt until then is saved"
            assert now.step > sight.step
        arguments = ["resume", str(out)]
    code, _, err = lamina("resume", out)
    assert code == 0, (code, err)
    assert_same_bits(out, unbroken("inflora"))
