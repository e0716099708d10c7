"""A small image model and a small text model, and an application that serves them in this process."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tests.models import SMALL, backbone
from tests.serving import learnt
from tests.tiny import raw_bert
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from lamina.model import Model
from lamina.serve import Limits, create_app

Client = Callable[..., TestClient]
WORDS = ("sun", "rain", "snow", "goal", "team", "ball")


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
    """A text model of two classes."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("news")
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    raw_bert(vocabulary=len(words)).save_pretrained(folder / "bert")
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.normalizer = normalizers.Replace("\u200b", "")  # of such a text, no token is left
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder / "bert")
    rows = ["text,label,split"]
    for number in range(24):
        pair = WORDS[:3] if number % 2 else WORDS[3:]
        label, split = "weather" if number % 2 else "sport", "test" if number > 15 else "train"
        rows.append(f"{pair[number % 3]} {pair[(number + 1) % 3]},{label},{split}")
    (folder / "news.csv").write_text("\n".join(rows) + "\n")
    settings = {key: value for key, value in SMALL.items() if key != "backbone.image_size"} | {"data.max_length": 16}
    model = Model.create(folder / "news", backbone=str(folder / "bert"), method="finetune", settings=settings)
    model.learn(folder / "news.csv", name="first")
    return folder / "news"


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
