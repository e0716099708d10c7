"""The served page in a real browser: a dropped file gets its class, a newer version is seen, and nothing else is requested."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.faults.processes import kill_all
from tests.models import CLASSES, backbone, images
from tests.serving import Server, copied, learnt, photo

from lamina.model import Model

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary was found on PATH")
EVIL = "<img src=x onerror=alert(1)>"
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return learnt(folder, backbone(folder / "vit"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield found
        found.close()


@pytest.fixture(autouse=True)
def _nothing_left_at_work() -> Iterator[None]:
    yield
    kill_all()


@pytest.fixture
def server(made: Path, tmp_path: Path) -> Iterator[Server]:
    found = Server(copied(made, tmp_path / "animals"))
    yield found
    found.stop()


class Visit:
    """A page, and what it asked for."""

    def __init__(self, browser: Any, server: Server, **settings: Any) -> None:
        self.home = f"http://127.0.0.1:{server.port}"
        self.page = browser.new_page(**settings)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        self.page.goto(self.home)

    def drop(self, *files: tuple[str, bytes]) -> None:
        """Drop files on the page, as from a file manager."""
        content = [[name, base64.b64encode(data).decode()] for name, data in files]
        transfer = self.page.evaluate_handle(
            """(files) => { const transfer = new DataTransfer();
            const bytes = (data) => Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            for (const [name, data] of files) transfer.items.add(new File([bytes(data)], name));
            return transfer; }""",
            content,
        )
        self.page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})

    def close(self) -> None:
        outside = [url for url in self.asked if not url.startswith((self.home, f"blob:{self.home}", "data:"))]
        assert not outside
        assert not self.errors
        self.page.close()


def test_dropped_files_get_their_class_and_damaged_ones_a_message(browser: Any, server: Server, made: Path) -> None:
    visit = Visit(browser, server)
    page = visit.page
    page.locator("#content").wait_for()
    assert page.locator("#summary").inner_text() == "Version 2 knows 6 classes from 2 tasks."
    visit.drop(("a.png", photo(1)), (EVIL, b"no image"), ("b.png", photo(2)))
    page.locator(".results .best, .results .wrong").nth(2).wait_for()
    expected = [one.label for one in Model(made).predict([photo(1), photo(2)])]
    assert page.locator(".results .best").all_inner_texts() == expected
    assert page.locator(".results .file").all_inner_texts() == ["a.png", EVIL, "b.png"]
    assert "cannot identify image file" in page.locator(".results .wrong").inner_text()
    assert page.locator(".results > li").nth(0).locator(".bars li").count() == 5
    assert "learnt in task task-" in page.locator(".results > li").nth(0).inner_text()
    page.locator("#clear").click()
    assert page.locator(".results > li").count() == 0
    assert page.locator("#classes li").all_inner_texts() == list(CLASSES)
    assert page.locator("#tasks tr").count() == 2
    assert page.locator("#chart svg path.l").count() >= 2
    assert page.locator("#history li").count() == 3
    visit.close()


def test_names_of_tasks_and_classes_are_text(browser: Any, made: Path, tmp_path: Path) -> None:
    table = pq.read_table(images(tmp_path / "plain.parquet", CLASSES[:2], seed=7))
    labels = [f"{EVIL} {label}" for label in table["label"].to_pylist()]
    pq.write_table(table.set_column(1, "label", [labels]), tmp_path / "evil.parquet")
    Model(copied(made, tmp_path / EVIL)).learn(tmp_path / "evil.parquet", name=f"task {EVIL}", force=True)
    server = Server(tmp_path / EVIL)
    visit = Visit(browser, server)
    page = visit.page
    page.locator("#content").wait_for()
    assert page.locator("h1").inner_text() == EVIL
    visit.drop(("a.png", table["image"][0].as_py()))
    page.locator(".results .best").wait_for()
    shown = page.locator("#classes li").all_inner_texts()
    assert shown == [*CLASSES, f"{EVIL} ant", f"{EVIL} bee"]
    assert f"task {EVIL}" in page.locator("#tasks").inner_text()
    assert f"task {EVIL}" in page.locator("#history").inner_text()
    assert f"task {EVIL}" in page.locator("#model").inner_text()
    assert f"task {EVIL}" in page.locator("#chart").inner_text()
    assert page.locator("main img:not([src^='blob:'])").count() == 0
    visit.close()
    server.stop()


def test_progress_counts_from_the_last_clear(browser: Any, server: Server) -> None:
    visit = Visit(browser, server)
    page = visit.page
    page.locator("#content").wait_for()
    held: list[Any] = []
    page.route("**/predict?*", lambda route: held.append(route))
    visit.drop(("a.png", photo(1)), ("b.png", photo(2)))
    page.get_by_text("0 of 2 predicted").wait_for()
    page.locator("#clear").click()
    visit.drop(("c.png", photo(3)))
    page.get_by_text("0 of 3 predicted").wait_for()
    for route in held:
        route.continue_()
    page.get_by_text("3 inputs predicted").wait_for()
    visit.close()


def test_the_server_that_was_gone_is_back(browser: Any, made: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-some-length")
    server = Server(made, "--token-file", tmp_path / "token")
    visit = Visit(browser, server)
    page = visit.page
    page.locator("#login").wait_for()
    page.route("**/ready", lambda route: route.abort())
    page.get_by_text("The server does not respond.").wait_for(timeout=20_000)
    page.unroute("**/ready")
    page.wait_for_function("() => !document.getElementById('summary').textContent", timeout=20_000)
    assert page.locator("#login").is_visible()
    visit.close()
    server.stop()


def test_a_version_that_is_refused_is_told_with_its_reason(browser: Any, server: Server, tmp_path: Path) -> None:
    visit = Visit(browser, server)
    visit.page.locator("#content").wait_for()
    Model(tmp_path / "animals").rollback()
    told = "A newer version is not served: the model has learnt no task yet"
    visit.page.get_by_text(told).or_(visit.page.get_by_text("A newer version is not served: animals")).wait_for(
        timeout=20_000
    )
    visit.close()


def test_the_keyboard_is_enough(browser: Any, server: Server) -> None:
    visit = Visit(browser, server)
    page = visit.page
    page.locator("#content").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "files"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files([{"name": "a.png", "mimeType": "image/png", "buffer": photo()}])
    page.locator(".results .best").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "clear"
    page.keyboard.press("Enter")
    assert page.locator(".results > li").count() == 0
    assert page.get_by_label("Choose images").count() == 1
    visit.close()


def test_a_newer_version_is_seen(browser: Any, server: Server, tmp_path: Path) -> None:
    visit = Visit(browser, server)
    visit.page.locator("#content").wait_for()
    Model(tmp_path / "animals").rollback("task-0")
    visit.page.get_by_text("Version 3 is served now; it was version 2. Newest task: task-0.").wait_for(timeout=20_000)
    assert visit.page.locator("#summary").inner_text() == "Version 3 knows 3 classes from 1 task."
    assert "rolled back to task-0" in visit.page.locator("#history").inner_text()
    visit.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_in_both_themes(
    browser: Any, server: Server, tmp_path: Path, width: int, scheme: str
) -> None:
    visit = Visit(browser, server, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = visit.page
    page.locator("#content").wait_for()
    visit.drop(("a-name-without-any-space-" * 6 + ".png", photo(1)), ("b.png", photo(2)), ("c", b"junk"))
    page.locator(".results .best, .results .wrong").nth(2).wait_for()
    shot = tmp_path / f"{width}-{scheme}.png"
    page.screenshot(path=shot, full_page=True)
    assert (
        page.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        == [width] * 2
    )
    with Image.open(shot) as image:
        corner = image.convert("L").getpixel((2, 2))
    assert corner > 240 if scheme == "light" else corner < 60
    visit.close()


def test_a_token_is_asked_for_and_kept_in_the_page_only(browser: Any, made: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-some-length")
    server = Server(made, "--token-file", tmp_path / "token")
    visit = Visit(browser, server)
    page = visit.page
    page.locator("#login").wait_for()
    assert not page.locator("#content").is_visible()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("The token is wrong.").wait_for()
    page.keyboard.type("a-token-of-some-length")
    page.keyboard.press("Enter")
    page.locator("#content").wait_for()
    visit.drop(("a.png", photo(1)))
    page.locator(".results .best").wait_for()
    stored = page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]")
    assert stored == [0, 0, ""]
    assert "Authorization" in page.locator("#curl").inner_text()
    visit.close()
    server.stop()
