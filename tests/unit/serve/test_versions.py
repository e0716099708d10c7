"""The swap of versions: loaded, checked, swapped or refused, and closed when the last request has ended."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.models import CLASSES, images
from tests.serving import photo
from tests.unit.serve.conftest import Client

from lamina.errors import ModelError
from lamina.model import Model, Predictor
from lamina.serve.versions import load, without_folders


@pytest.fixture
def model(animals: Path, tmp_path: Path) -> Path:
    shutil.copytree(animals, tmp_path / "model")
    return tmp_path / "model"


def until(found: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rollback_is_picked_up_as_a_new_version(serve: Client, model: Path) -> None:
    client = serve(model)
    assert client.post("/predict", files={"file": photo()}).json()["version"] == 2
    Model(model).rollback("task-0")
    until(lambda: client.get("/ready").json()["version"] == 3)
    response = client.post("/predict?top=9", files={"file": photo()})
    assert response.json()["version"] == 3
    assert response.headers["x-model-version"] == "3"
    assert {guess["class"] for guess in response.json()["predictions"][0]["top"]} == set(CLASSES[:3])
    assert [task["name"] for task in client.get("/tasks").json()["tasks"]] == ["task-0"]
    assert client.get("/tasks").json()["history"][-1]["event"] == "rolled back"


def test_a_new_task_is_picked_up(serve: Client, model: Path, tmp_path: Path) -> None:
    client = serve(model)
    Model(model).learn(images(tmp_path / "more.parquet", CLASSES[:2], seed=5), name="again")
    until(lambda: client.get("/model").json()["task"] == "again")
    assert client.get("/model").json()["tasks"] == 3


def test_a_setting_that_changes_no_version_changes_nothing(serve: Client, model: Path) -> None:
    client = serve(model)
    Model(model).configure({"gate.task_drop": 0.5})
    time.sleep(0.3)
    assert client.get("/ready").json() == {"ready": True, "version": 2, "refused": None}


def test_a_version_that_cannot_be_loaded_is_refused_and_the_old_one_goes_on(
    serve: Client, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(model)
    file = model / "tasks" / "0001-task-0" / "adapters.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    Model(model).rollback("task-0")
    until(lambda: client.get("/ready").json()["refused"] is not None)
    assert client.get("/ready").json()["refused"] == {"version": 3}, "anyone may ask, and the reason is not for anyone"
    refused = client.get("/model").json()["refused"]
    assert refused["version"] == 3
    assert "adapters.safetensors is damaged" in refused["reason"]
    assert str(model.parent) not in refused["reason"]
    assert client.get("/ready").json()["ready"]
    assert client.post("/predict", files={"file": photo()}).json()["version"] == 2
    assert "version 3 is refused, and version 2 goes on being served" in caplog.text
    assert "lamina_refused_versions 1.0" in client.get("/metrics").text
    file.write_bytes(content)
    Model(model).rollback("task-1")
    until(lambda: client.get("/ready").json()["version"] == 4)
    assert client.get("/ready").json()["refused"] is None


def test_a_version_of_another_kind_is_refused(serve: Client, model: Path, news: Path) -> None:
    client = serve(model)
    shutil.move(model, model.with_name("old"))
    shutil.copytree(news, model.with_name("new"))
    Model(model.with_name("new")).rollback("first")
    Model(model.with_name("new")).rollback("first")
    model.with_name("new").rename(model)
    until(lambda: client.get("/ready").json()["refused"] is not None)
    assert client.get("/ready").json()["refused"] == {"version": 3}
    assert "it takes texts, and the server was started for images" in client.get("/model").json()["refused"]["reason"]
    assert client.post("/predict", files={"file": photo()}).json()["version"] == 2


def test_a_version_that_failed_for_want_of_memory_is_tried_again(
    serve: Client, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(model, seconds=0.02)
    failures = [MemoryError("no memory")]
    real = Predictor.outcomes

    def failing(self: Predictor, examples: object) -> object:
        if failures:
            raise failures.pop()
        return real(self, examples)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "outcomes", failing)
    Model(model).rollback("task-0")
    until(lambda: client.get("/ready").json()["version"] == 3)
    assert not failures
    assert client.get("/ready").json()["refused"] is None
    assert "lamina_refused_versions 1.0" in client.get("/metrics").text


def test_the_end_does_not_wait_for_a_version_that_is_being_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio
    import threading

    from lamina.serve import versions as module

    found = module.Versions(model, seconds=0.02)
    begun, end = threading.Event(), threading.Event()
    monkeypatch.setattr(module, "load", lambda *_: (begun.set(), end.wait(30)))

    async def main() -> None:
        task = asyncio.create_task(found.watch())
        used = found.take()
        Model(model).rollback("task-0")
        while not begun.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        started = time.monotonic()
        found.close()
        assert time.monotonic() - started < 1
        used.retired = True
        found.give(used)

    try:
        asyncio.run(main())
    finally:
        end.set()


def test_messages_lose_the_folders_of_the_machine() -> None:
    told = "/srv/models/shop/tasks/0001-a/card.json is damaged: 1/2 of it; use 'lamina rollback /srv/models/shop TASK', see a/b"
    shown = "shop/tasks/0001-a/card.json is damaged: 1/2 of it; use 'lamina rollback shop TASK', see a/b"
    assert without_folders("/opt/base/w.safetensors is gone", Path("/srv/models/shop")) == "w.safetensors is gone"
    assert without_folders(told, Path("/srv/models/shop")) == shown
    told = "/srv/my models/a shop/tasks/0001-a/card.json is damaged; use 'lamina rollback /srv/my models/a shop TASK'"
    shown = "a shop/tasks/0001-a/card.json is damaged; use 'lamina rollback a shop TASK'"
    assert without_folders(told, Path("/srv/my models/a shop")) == shown
    assert without_folders("my models/shop/x is damaged", Path("my models/shop")) == "shop/x is damaged"


def test_a_new_version_may_fail_in_any_way(serve: Client, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(model)
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "outcomes", lambda *_: {}["missing"])
        Model(model).rollback("task-0")
        until(lambda: client.get("/ready").json()["refused"] is not None)
        assert client.get("/model").json()["refused"] == {"version": 3, "reason": "KeyError: 'missing'"}
        assert client.get("/ready").json()["version"] == 2
        Model(model).rollback("task-1")
        until(lambda: (client.get("/model").json()["refused"] or {}).get("version") == 4)
    until(lambda: client.get("/ready").json()["version"] == 4)
    assert client.post("/predict", files={"file": photo()}).json()["version"] == 4


def test_a_model_rolled_back_to_nothing_is_refused(serve: Client, model: Path) -> None:
    client = serve(model)
    Model(model).rollback()
    until(lambda: client.get("/ready").json()["refused"] is not None)
    assert "has learnt no task" in client.get("/model").json()["refused"]["reason"]
    assert client.post("/predict", files={"file": photo()}).json()["version"] == 2


def test_a_model_json_that_is_gone_or_damaged_is_refused(serve: Client, model: Path) -> None:
    client = serve(model)
    content = (model / "model.json").read_bytes()
    for damaged in (content[:-40], b"", content.replace(b'"version": 2', b'"version": 3')):
        (model / "model.json").write_bytes(damaged)
        until(lambda: client.get("/ready").json()["refused"] is not None)
        assert client.post("/predict", files={"file": photo()}).json()["version"] == 2
        (model / "model.json").write_bytes(content)
        until(lambda: client.get("/ready").json()["refused"] is None)
    (model / "model.json").unlink()
    until(lambda: client.get("/ready").json()["refused"] is not None)
    assert client.post("/predict", files={"file": photo()}).status_code == 200


def test_a_version_with_other_weights_than_were_measured_fails_the_check(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "as recorded" in load(model).checked
    gate = Model(model).cards[-1].gate
    assert gate is not None
    probes = sum(change.examples for change in gate.tasks)
    correct = sum(round(change.after * change.examples) for change in gate.tasks)
    assert correct > 1
    real = Predictor.outcomes

    def other(self: Predictor, examples: object) -> object:
        found = real(self, examples)  # type: ignore[arg-type]
        return found._replace(predicted_n=found.labels_n - 1)

    monkeypatch.setattr(Predictor, "outcomes", other)
    with pytest.raises(ModelError, match=rf"0 of {probes} probes .* where {correct} were correct when it was learnt"):
        load(model)


def test_a_version_whose_predictions_are_not_finite_fails_the_check(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Predictor.outcomes

    def broken(self: Predictor, examples: object) -> object:
        found = real(self, examples)  # type: ignore[arg-type]
        return found._replace(confidence_n=found.confidence_n * float("nan"))

    monkeypatch.setattr(Predictor, "outcomes", broken)
    with pytest.raises(ModelError, match="is not finite"):
        load(model)


@pytest.mark.parametrize("kind", ["animals", "news"])
def test_a_model_without_probes_is_checked_on_noise(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    Model(tmp_path / "model").forget_kept()
    assert load(tmp_path / "model").checked == "no probes are kept; predictions for noise are finite"


def test_a_model_without_tasks_is_not_served(serve: Client, animals: Path, tmp_path: Path) -> None:
    shutil.copytree(animals, tmp_path / "model")
    Model(tmp_path / "model").rollback()
    with pytest.raises(ModelError, match=r"has learnt no task yet. `lamina learn .* DATA` teaches it one"):
        serve(tmp_path / "model")
    with pytest.raises(ModelError, match="is not a model"):
        serve(tmp_path)


def test_the_old_version_is_closed_when_its_last_request_has_ended(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    from lamina.serve.versions import Versions

    closed: list[int] = []
    real = Predictor.close

    def close(self: Predictor) -> None:
        closed.append(self.version)
        real(self)

    monkeypatch.setattr(Predictor, "close", close)

    async def main() -> None:
        versions = Versions(model, seconds=0.02)
        task = asyncio.create_task(versions.watch())
        used = versions.take()
        Model(model).rollback("task-0")
        while versions.current.number != 3:
            await asyncio.sleep(0.02)
        assert not closed
        assert used.predictor.scores(used.predictor.read([photo()])[0]).isfinite().all()  # type: ignore[arg-type]
        versions.give(used)
        while closed != [2]:
            await asyncio.sleep(0.02)
        task.cancel()
        versions.close()

    asyncio.run(main())
    assert closed == [2, 3]
