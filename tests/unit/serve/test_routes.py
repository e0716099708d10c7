"""The routes: what they answer for a model of images and one of texts."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tests.models import CLASSES
from tests.serving import form, photo
from tests.unit.serve.conftest import Client, error

from lamina.model import Model, Store


def test_a_photo_gets_class_probability_and_task(serve: Client, animals: Path) -> None:
    response = serve().post("/predict?top=3", files={"file": ("a photo.png", photo())})
    assert response.status_code == 200
    content = response.json()
    assert content["version"] == 2
    assert response.headers["x-model-version"] == "2"
    (found,) = content["predictions"]
    assert found["name"] == "a photo.png"
    assert len(found["top"]) == 3
    (expected,) = Model(animals).predict([photo()], top=3)
    assert [(g["class"], g["task"]) for g in found["top"]] == [(g.label, g.task) for g in expected.guesses]
    assert [g["probability"] for g in found["top"]] == pytest.approx([g.probability for g in expected.guesses])
    assert {key: found[key] for key in ("class", "probability", "task")} == found["top"][0]


def test_several_photos_keep_their_order(serve: Client, animals: Path) -> None:
    photos = [photo(seed) for seed in range(5)]
    files = [("file", (f"{k}.png", content)) for k, content in enumerate(photos)]
    found = serve().post("/predict", files=files).json()["predictions"]
    assert [one["name"] for one in found] == [f"{k}.png" for k in range(5)]
    assert [one["class"] for one in found] == [one.label for one in Model(animals).predict(photos)]


def test_an_image_may_be_the_body(serve: Client) -> None:
    for kind in ("image/png", "application/octet-stream"):
        found = serve().post("/predict", content=photo(), headers={"content-type": kind}).json()["predictions"]
        assert found[0]["name"] is None
        assert found[0]["class"] in CLASSES


def test_texts(serve: Client, news: Path) -> None:
    client = serve(news)
    texts = ["sun rain", "goal team ball", "rain"]
    found = client.post("/predict?top=1", json={"texts": texts}).json()["predictions"]
    assert [one["class"] for one in found] == [one.label for one in Model(news).predict(texts)]
    assert "name" not in found[0]
    assert [len(one["top"]) for one in found] == [1, 1, 1]


def test_a_text_that_cannot_be_read_is_named_and_does_not_harm_others(serve: Client, news: Path) -> None:
    client = serve(news)
    for bad, what in (("  ", "empty"), ("\ud800", "Unicode"), ("\u200b", "token")):
        response = client.post("/predict", content=json.dumps({"texts": ["sun", bad]}),
                               headers={"content-type": "application/json"})  # fmt: skip
        assert response.status_code == 422, bad
        assert error(response).startswith("texts[1]"), error(response)
        assert what in error(response)


def test_tasks_say_what_was_learnt_and_how_it_changed(serve: Client, animals: Path) -> None:
    found = serve().get("/tasks").json()
    assert [task["name"] for task in found["tasks"]] == ["task-0", "task-1"]
    assert found["classes"] == list(CLASSES)
    assert [point["after"] for point in found["tasks"][0]["accuracy"]] == ["task-0", "task-1"]
    gate = Model(animals).cards[-1].gate
    assert gate is not None
    change = gate.tasks[0]
    points = found["tasks"][0]["accuracy"]
    assert [point["accuracy"] for point in points] == [change.before, change.after]
    assert [point["probes"] for point in points] == [True, True]
    assert found["tasks"][1]["accuracy"][0]["probes"] is False
    assert [event["event"] for event in found["history"]] == ["created", "learnt", "learnt"]


def test_the_history_is_read_again_only_where_it_has_changed(
    serve: Client, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(animals, tmp_path / "model")
    reads: list[int] = []
    real = Store.events
    monkeypatch.setattr(Store, "events", lambda self: (reads.append(1), real(self))[1])
    client = serve(tmp_path / "model")
    first = client.get("/tasks").json()
    assert client.get("/tasks").json() == first
    assert len(reads) == 1
    Model(tmp_path / "model").configure({"gate.task_drop": 0.5})
    assert client.get("/tasks").json()["history"][-1]["event"] == "configured"


def test_the_model_is_described_without_folders_of_the_machine(serve: Client, animals: Path) -> None:
    client = serve()
    found = client.get("/model").json()
    assert found["name"] == "animals"
    assert found["base"]["name"] == "vit"
    assert found["version"] == 2
    assert found["gate"]["accepted"]
    assert found["refused"] is None
    assert found["checked"].startswith("12 probes, all predictions finite; ")
    for path in ("/", "/model", "/tasks", "/ready", "/openapi.json"):
        assert str(animals.parent) not in client.get(path).text


def test_health_ready_and_metrics(serve: Client) -> None:
    client = serve()
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"ready": True, "version": 2, "refused": None}
    client.post("/predict", files={"file": photo()})
    client.post("/predict", content=b"x", headers={"content-type": "text/plain"})
    text = client.get("/metrics").text
    assert 'lamina_requests_total{route="/predict",status="200"} 1.0' in text
    assert 'lamina_refusals_total{reason="media_type"} 1.0' in text
    assert "lamina_model_version 2.0" in text
    assert "lamina_batch_inputs_count 1.0" in text
    assert "lamina_queue_inputs 0.0" in text
    assert "lamina_body_bytes 0.0" in text


def test_openapi_describes_the_routes(serve: Client, news: Path) -> None:
    found = serve().get("/openapi.json").json()
    assert set(found["paths"]) == {"/predict", "/tasks", "/model", "/health", "/ready", "/metrics"}
    assert "multipart/form-data" in found["paths"]["/predict"]["post"]["requestBody"]["content"]
    texts = serve(news).get("/openapi.json").json()
    assert set(texts["paths"]["/predict"]["post"]["requestBody"]["content"]) == {"application/json"}


def test_there_is_no_page_that_loads_scripts_from_elsewhere(serve: Client) -> None:
    client = serve()
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.text)
    assert not re.search(r"<[^>]+\son\w+=", page.text)


def test_every_response_has_the_security_headers(serve: Client) -> None:
    client = serve()
    for response in (client.get("/"), client.get("/tasks"), client.get("/nothing"), client.put("/predict")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-model-version"] == "2"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "access-control-allow-origin" not in response.headers


def test_an_unknown_route_method_or_query_is_refused_as_json(serve: Client) -> None:
    client = serve()
    assert (client.get("/nothing").status_code, client.get("/predict").status_code) == (404, 405)
    error(client.get("/nothing"))
    error(client.get("/predict"))
    assert client.get("/tasks?x=1").status_code == 422
    assert "allowed is POST" in error(client.get("/predict"))
    response = client.post("/predict?top=21", files={"file": photo()})
    assert (response.status_code, "top" in error(response), "20" in error(response)) == (422, True, True)
    for top in ("0", "-1", "x", "1e9", "99999999999"):
        response = client.post(f"/predict?top={top}", files={"file": photo()})
        assert response.status_code == 422
        assert "top" in error(response)


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\\\..\\\\boot.ini", "boot.ini"),
        ("a\x07\x1b[31mb.png", "a[31mb.png"),
        ("x" * 500, "x" * 120),
        ("/", None),
        ("<img src=x>", "<img src=x>"),
    ],
)
def test_the_name_of_a_file_is_text_without_folders(serve: Client, sent: str, shown: str | None) -> None:
    body, kind = form((sent, photo()))
    response = serve().post("/predict", content=body, headers={"content-type": kind})
    assert response.status_code == 200
    assert response.json()["predictions"][0]["name"] == shown
