"""What a user should know about a run is said while it works, once, and survives a crash."""

from pathlib import Path
from typing import Any

import pytest
from tests.conformance.cases import EVALUATION, TRAINING, make_method
from tests.tiny import tiny_images, tiny_vit

from lamina.config import RehearsalConfig
from lamina.data.streams import class_plan, make_stream
from lamina.engine.loop import Event, Interrupted, Loop
from lamina.learner import Learner


def loop_over(tasks: int, folder: Path, method: str = "finetune", **watch: Any) -> Loop:
    data = tiny_images(48, 4)
    return Loop(
        learner=Learner(tiny_vit(blocks=1)),
        method=make_method(method),
        stream=make_stream(data, class_plan(data, tasks), "class"),
        training=TRAINING,
        evaluation=EVALUATION,
        seed=0,
        checkpoints=folder,
        **watch,
    )


@pytest.mark.parametrize(("tasks", "method", "count"), [(4, "finetune", 4), (2, "finetune", 0), (4, "prototype", 0)])
def test_a_task_with_a_single_class_teaches_adapters_nothing_and_that_is_said(
    tasks: int, method: str, count: int, tmp_path: Path
):
    said: list[str] = []

    def listen(event: Event) -> None:
        said.extend([event.note] if event.note else [])

    loop = loop_over(tasks, tmp_path, method, on_event=listen)
    loop.run()
    assert len(said) == count
    assert list(loop.state.notes) == said
    for number, text in enumerate(said, 1):
        assert f"task 'task-0{number}' has a single class" in text
        assert "two or more classes" in text


def test_with_rehearsal_only_the_first_task_teaches_adapters_nothing(tmp_path: Path):
    loop = loop_over(4, tmp_path, rehearsal=RehearsalConfig(per_class=1))
    loop.run()
    (note,) = loop.state.notes
    assert "task 'task-01' has a single class" in note
    assert {loss.task for loss in loop.state.losses if loss.value == 0.0} == {0}


def test_with_a_single_class_the_loss_is_zero_indeed(tmp_path: Path):
    loop = loop_over(4, tmp_path)
    loop.run()
    assert {loss.value for loss in loop.state.losses} == {0.0}


def test_notes_survive_a_stop(tmp_path: Path):
    loop = loop_over(4, tmp_path)
    loop.should_stop = lambda: loop.position.task == 1 and loop.position.phase == "train"
    with pytest.raises(Interrupted):
        loop.run()
    again = loop_over(4, tmp_path)
    again.restore()
    assert again.state.notes == loop.state.notes
    again.run()
    assert len(again.state.notes) == 4
