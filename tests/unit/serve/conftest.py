"""A small image model and a small text model, and an application that serves them in this process."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tests.models import backbone
from tests.serving import learnt, learnt_texts

from lamina.serve import Limits, create_app

Client = Callable[..., TestClient]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six classes in two tasks. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("animals")
    return learnt(folder, backbone(folder / "vit"))


@pytest.fixture(scope="session")
def news(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model of two classes. Tests that change it copy it."""
    return learnt_texts(tmp_path_factory.mktemp("news"))


@pytest.fixture
def serve(animals: Path) -> Iterator[Client]:
    """Makes clients of an application that serves the image model, or another."""
    clients: list[TestClient] = []

    def made(path: Path = animals, *, token: str | None = None, seconds: float = 0.05, **limits: float) -> TestClient:
        client = TestClient(create_app(path, limits=Limits(**limits), token=token, seconds=seconds))  # type: ignore[arg-type]
        client.__enter__()
        clients.append(client)
        return client

    yield made
    for client in clients:
        client.__exit__(None, None, None)


def error(response: object) -> str:
    """The message of a refusal."""
    content = json.loads(response.content)  # type: ignore[attr-defined]
    assert content.keys() == {"error"}
    return str(content["error"])
