"""What the tests of faults share: a cache of their own, and runs that nothing disturbed."""

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.faults.processes import kill_all, lamina, small_run


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session, one for all its workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session", autouse=True)
def _own_cache(shared: Path) -> Iterator[None]:
    """Decoded images go nowhere near the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(autouse=True)
def _nothing_left_at_work() -> Iterator[None]:
    yield
    kill_all()


@pytest.fixture(scope="session")
def unbroken(shared: Path, _own_cache: None) -> Callable[[str], Path]:
    """The directory of a small finished run of a method, made once."""

    def made(method: str) -> Path:
        out = shared / f"unbroken-{method}"
        with (shared / f"unbroken-{method}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / "results.json").exists():
                code, _, err = lamina(*small_run(out, method))
                assert code == 0, err
        return out

    return made
