"""Batches: what is computed together, what waits, what is refused, and that nobody gets another's prediction."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.serving import photo
from tests.unit.serve.conftest import Client, error

from lamina.model import Model, Predictor
from lamina.serve import Limits, Refusal, batching
from lamina.serve.batching import Batcher
from lamina.serve.versions import Version, load


@pytest.fixture
def version(animals: Path) -> Version:
    return load(animals)


def running(version: Version, work: Callable[[Batcher], Any], sizes: list[int] | None = None, **limits: float) -> Any:
    """What some work with a running batcher returns."""

    async def main() -> Any:
        batcher = Batcher(Limits(**limits), (sizes if sizes is not None else []).append)  # type: ignore[arg-type]
        task = asyncio.create_task(batcher.run())
        try:
            return await work(batcher)
        finally:
            task.cancel()
            batcher.close()
            assert not batcher.admitted

    return asyncio.run(main())


def soon(seconds: float = 30) -> float:
    return time.monotonic() + seconds


def test_concurrent_requests_are_computed_together_and_kept_apart(version: Version, animals: Path) -> None:
    photos = [photo(seed) for seed in range(40)]
    expected = [found.label for found in Model(animals).predict(photos)]
    sizes: list[int] = []

    async def work(batcher: Batcher) -> list[Any]:
        jobs = [batcher.predict(version, [one], 1 + k % 3, soon(), lambda: None) for k, one in enumerate(photos)]
        return list(await asyncio.gather(*jobs))

    found = running(version, work, sizes, batch=8)
    assert [one.label for (one,) in found] == expected
    assert [len(one.guesses) for (one,) in found] == [1 + k % 3 for k in range(40)]
    assert sum(sizes) == 40
    assert max(sizes) <= 8
    assert len(sizes) < 30


def test_an_idle_server_does_not_wait(version: Version) -> None:
    async def work(batcher: Batcher) -> float:
        started = time.monotonic()
        await batcher.predict(version, [photo()], 1, soon(), lambda: None)
        return time.monotonic() - started

    assert running(version, work, wait_ms=60_000) < 5


def test_a_request_larger_than_a_batch_is_computed_in_pieces(version: Version, animals: Path) -> None:
    photos = [photo(seed) for seed in range(11)]

    async def work(batcher: Batcher) -> list[Any]:
        return await batcher.predict(version, [*photos[:5], b"junk", *photos[5:]], 2, soon(), lambda: None)

    found = running(version, work, batch=4)
    assert found[5].error
    assert [one.label for one in (*found[:5], *found[6:])] == [one.label for one in Model(animals).predict(photos)]


def test_texts_of_several_requests_are_joint_and_a_bad_one_harms_nobody(news: Path) -> None:
    version = load(news)

    async def work(batcher: Batcher) -> list[Any]:
        jobs = [batcher.predict(version, [text], 1, soon(), lambda: None) for text in ("sun", "\u200b", "goal", " ")]
        return list(await asyncio.gather(*jobs))

    (sun,), (nothing,), (goal,), (empty,) = running(version, work)
    assert [sun.label, goal.label] == [one.label for one in Model(news).predict(["sun", "goal"])]
    assert "token" in nothing.error
    assert empty.error == "an empty text"


def test_bytes_are_no_text(news: Path) -> None:
    version = load(news)

    async def work(batcher: Batcher) -> list[Any]:
        return await batcher.predict(version, ["sun", photo()], 1, soon(), lambda: None)

    sun, image = running(version, work)
    assert sun.label
    assert image.error == "an image, where the model takes texts"


def test_a_full_queue_refuses_with_a_time_to_try_again(version: Version) -> None:
    async def work(batcher: Batcher) -> None:
        batcher.refuse_if_full(500)
        batcher.admitted = 500
        batcher.refuse_if_full(12)
        with pytest.raises(Refusal, match=r"the queue is full \(500 inputs\).*--max-queue") as refused:
            batcher.refuse_if_full(13)
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "1"})
        batcher.admitted = 0

    running(version, work)


def test_a_deadline_that_passes_refuses_and_frees_its_place_when_the_thread_ends(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Predictor.read

    def slow(self: Predictor, inputs: Any) -> Any:
        time.sleep(0.3)
        return real(self, inputs)

    monkeypatch.setattr(Predictor, "read", slow)
    ended: list[str] = []

    async def work(batcher: Batcher) -> None:
        with pytest.raises(Refusal, match="--max-deadline-seconds") as refused:
            await batcher.predict(version, [photo()] * 5, 1, soon(0.05), lambda: ended.append("done"))
        assert refused.value.status == 503
        assert batcher.admitted == 5, "the thread still decodes"
        assert not ended
        while not ended:
            await asyncio.sleep(0.02)

    started = time.monotonic()
    running(version, work)
    assert time.monotonic() - started < 1, "the other four were not decoded"


@pytest.mark.parametrize(("large", "most"), [(10, 1), (10**9, 2)])
def test_large_images_are_decoded_one_at_a_time(
    version: Version, monkeypatch: pytest.MonkeyPatch, large: int, most: int
) -> None:
    real, active, seen = Predictor.read, [0], [0]

    def slow(self: Predictor, inputs: Any) -> Any:
        active[0] += 1
        seen[0] = max(seen[0], active[0])
        time.sleep(0.05)
        active[0] -= 1
        return real(self, inputs)

    monkeypatch.setattr(Predictor, "read", slow)
    monkeypatch.setattr(batching, "LARGE", large)

    async def work(batcher: Batcher) -> None:
        jobs = [batcher.predict(version, [photo(k)], 1, soon(), lambda: None) for k in range(6)]
        await asyncio.gather(*jobs)

    running(version, work)
    assert seen[0] == most


def test_a_failure_reaches_the_requests_of_its_batch_only(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Predictor.predictions
    failures = [RuntimeError("no memory")]

    def failing(self: Predictor, batch: Any, top: int = 1) -> Any:
        if failures:
            raise failures.pop()
        return real(self, batch, top)

    monkeypatch.setattr(Predictor, "predictions", failing)

    async def work(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="no memory"):
            await batcher.predict(version, [photo()], 1, soon(), lambda: None)
        assert (await batcher.predict(version, [photo()], 1, soon(), lambda: None))[0].label

    running(version, work)


def test_an_unexpected_failure_is_500_as_json_and_the_server_goes_on(
    serve: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predictions", lambda *_: 1 / 0)
        response = client.post("/predict", files={"file": photo()})
        assert response.status_code == 500
        assert "internal error" in error(response)
    assert client.post("/predict", files={"file": photo()}).status_code == 200


def test_many_threads_through_the_whole_application(serve: Client, animals: Path) -> None:
    client = serve()
    expected = [one.label for one in Model(animals).predict([photo(seed) for seed in range(24)])]

    def one(seed: int) -> str:
        response = client.post("/predict", files={"file": (f"{seed}", photo(seed))})
        assert response.status_code == 200, response.content
        (found,) = response.json()["predictions"]
        assert found["name"] == f"{seed}"
        return str(found["class"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(24))) == expected
    batches = [
        line for line in client.get("/metrics").text.splitlines() if line.startswith("lamina_batch_inputs_count")
    ]
    assert float(batches[0].split()[1]) <= 24
