"""How a learner is measured: answers come in the order of the data, whatever the order of the batches."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tests.conformance.cases import World, make_loop

from lamina.engine.evaluate import predict_all
from lamina.types import Batch, Examples


def test_texts_of_a_batch_are_of_like_length_and_answers_in_the_order_of_the_data(tmp_path: Path):
    loop = make_loop("prototype", World("bert", "class"), tmp_path)
    loop.run()
    task = loop.stream[0]
    lengths_n = task.test.lengths()
    assert (np.diff(lengths_n) < 0).any(), "the data is not in order of length already"
    seen: list[int] = []

    def one_by_one(examples: Examples) -> Iterator[Batch]:
        seen.extend(examples.lengths())
        return (examples.batch(np.array([i])) for i in range(len(examples)))

    found = predict_all(loop.learner, loop.method, task.test, one_by_one, task.name)
    assert seen == sorted(lengths_n)
    assert found.labels_n.tolist() == task.test.labels_n.tolist()
    for i in range(len(task.test)):
        alone = predict_all(loop.learner, loop.method, task.test.select(np.array([i])), one_by_one, task.name)
        assert (alone.predicted_n, alone.task_aware_n, alone.task_inferred_n) == (
            found.predicted_n[i],
            found.task_aware_n[i],
            found.task_inferred_n[i],
        )
