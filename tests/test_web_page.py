"""The page in a browser: headless Chromium against the real server, with an agent whose answers are written here.

The picture in the documentation is made by `DATAPLANE_PICTURES=1 .venv/bin/python -m pytest tests/test_web_page.py`.
"""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from dataplane.rows import Counts, Look, RealServerRow

from .guest import REQUIRED
from .web_stage import ScriptedAgent, Stage, look, real, service, staged

pytestmark = pytest.mark.slow
CHROMIUM = Path("/usr/bin/chromium")
# The last ones keep it from calling its makers' servers.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PHONE, DESK = (390, 844), (1280, 860)
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "img" / "web.png"
PICTURES = os.environ.get("DATAPLANE_PICTURES") == "1"
HOSTILE = "<img src=x onerror=alert(1)>"
MILLISECONDS = 15_000


class Traffic(ScriptedAgent):
    """Services of the tutorial's kind, with connections that come in waves, and one backend that drains."""

    loads = (
        ("default/dns:dns-tcp", "10.0.0.10", 35.0),
        ("default/hostnames:http", "10.0.1.175", 240.0),
        ("shop/cart:http", "10.0.1.20", 120.0),
        ("shop/checkout:https", "10.0.1.21", 64.0),
        ("shop/search:http", "10.0.1.22", 410.0),
    )

    def __init__(self) -> None:
        super().__init__()
        self.begun = time.time() - 1800
        for cause, seconds in (("start", 0.021), *(("change", 0.0008 * 1.4**n) for n in range(12))):
            self.agent._figures.sync(cause, "committed", seconds, 1, 1, 0)
        self.agent._figures.sync("resync", "unchanged", 0.0004, 0, 0, 0)
        self.agent._figures.sync("disturbed", "committed", 0.003, 2, 0, 0)
        self.agent._started = self.begun - 86_000
        self.status = {"draining": 1, "lastSyncAt": time.time() - 4, "lastSync": None}

    def hits(self, load: float, number: int, at: float) -> int:
        """A wave of its own for each backend; grows all the time."""
        seconds, period = at - self.begun, 40 + 13 * number
        wave = period / 2 / math.pi * 0.45 * math.cos(2 * math.pi * seconds / period)
        return int(load / 3 * (seconds - wave))

    def next_look(self) -> Look:
        at = time.time()
        rows = []
        for index, (label, address, load) in enumerate(self.loads):
            reals: list[RealServerRow] = []
            for number, pod in enumerate(("10.244.1.7", "10.244.2.3", "10.244.3.6")):
                drains = index == 1 and number == 1
                count = self.hits(load, number, self.begun + 1500 if drains else at)
                how: dict[str, Any] = {"active": 3 + number}
                if drains:
                    how |= {"weight": 0, "state": "draining", "drain_seconds_left": 540}
                reals.append(real(pod, count, **how))
            rows.append(service(label, address, *reals))
        counts = Counts("probe", ("fexit:ip_vs_schedule",), {"full": 0})
        return replace(look(*rows, counts=counts), at=at)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        if REQUIRED and "ubuntu" not in Path("/etc/os-release").read_text():  # there it is a snap only
            pytest.fail("Chromium is not here: vagrant/provision.sh --tests installs it")
        pytest.skip("Chromium is not here (package chromium)")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("page"), Traffic()) as one:
        yield one


@pytest.fixture
def page(browser: Browser, stage: Stage) -> Iterator[Page]:
    yield from opened(browser, stage, DESK)


def opened(browser: Browser, stage: Stage, size: tuple[int, int], scheme: Any = "light") -> Iterator[Page]:
    """The page, with its first figures; nothing may complain."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    complaints: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(stage.url)
    page.wait_for_selector(".service .real")
    yield page
    context.close()
    assert complaints == []


def test_services_their_backends_and_the_agent_are_there(page: Page) -> None:
    expect(page.locator(".service .name").first).to_have_text("default/dns:dns-tcp")
    expect(page.locator(".service")).to_have_count(5)
    expect(page.locator("#mode")).to_have_text("ipvs")
    expect(page.locator("#node")).to_have_text("node-1")
    expect(page.locator("#health")).to_have_text("healthy")
    expect(page.locator("#source")).to_have_text("probe")
    expect(page.locator("#missed")).to_have_text("none missed")
    expect(page.locator("#drift")).to_have_text("2")
    assert page.title() == "ipvs on node-1 – dataplane"


def test_figures_come_live(page: Page) -> None:
    hits = page.locator(".service .of-hits .num").first
    before = hits.inner_text()
    expect(hits).not_to_have_text(before, timeout=MILLISECONDS)
    expect(page.locator(".service .of-rate .num").first).not_to_have_text("–", timeout=MILLISECONDS)


def test_a_chosen_service_has_a_chart_and_its_clock(page: Page) -> None:
    page.get_by_role("button", name="default/hostnames:http").click()
    expect(page.locator("#one-name")).to_have_text("default/hostnames:http")
    expect(page.locator("#chart canvas")).to_have_count(1)
    expect(page.locator("#one-rows tr")).to_have_count(3)
    expect(page.locator("#one-rows .tag[data-state=draining]")).to_have_text("drains 9m")
    assert "open=10.0.1.175" in page.url
    page.reload()
    expect(page.locator("#one-name")).to_have_text("default/hostnames:http")


def test_the_filter_asks_the_server(page: Page) -> None:
    page.keyboard.press("/")
    page.keyboard.type("shop ")
    expect(page.locator(".service")).to_have_count(3)
    expect(page.locator("#found")).to_have_text("3 of 5 Service ports")
    page.locator("#sort").select_option("rate")
    expect(page.locator(".service .name").first).to_have_text("shop/search:http")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(browser: Browser, stage: Stage, scheme: str) -> None:
    for page in opened(browser, stage, PHONE, scheme):
        expect(page.locator("#chart canvas")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        too_wide = (
            "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
        )
        assert page.evaluate(f"{too_wide}.map((e) => e.outerHTML.slice(0, 200))") == []


def test_names_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    agent = ScriptedAgent()
    agent.look = look(service(f"default/{HOSTILE}:{HOSTILE}", "10.0.1.175", real("10.244.1.7", 5)))
    agent.status = {"problems": [HOSTILE], "healthy": False, "lastError": f"{HOSTILE} failed"}
    with staged(tmp_path, agent) as stage:
        for page in opened(browser, stage, PHONE):
            expect(page.locator(".service .name")).to_have_text(f"default/{HOSTILE}:{HOSTILE}")
            expect(page.locator("#one-name")).to_contain_text(HOSTILE)
            expect(page.locator("#problem-list li")).to_have_text([f"{HOSTILE} failed", HOSTILE])
            expect(page.locator("#health")).to_have_text("not healthy")
            assert page.locator("main img").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]


def test_an_agent_that_is_gone_is_told_and_comes_back(browser: Browser, tmp_path: Path) -> None:
    agent = Traffic()
    with staged(tmp_path, agent) as stage:
        for page in opened(browser, stage, DESK):
            agent.trouble = "everything"
            expect(page.locator("#trouble")).to_contain_text("the agent could not answer", timeout=MILLISECONDS)
            expect(page.locator("#health")).to_have_text("no agent")
            agent.trouble = ""
            expect(page.locator("#health")).to_have_text("healthy", timeout=MILLISECONDS)
            expect(page.locator("#trouble")).to_be_hidden()


def test_the_documentation_shows_the_page_as_it_is(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {"net.netfilter.nf_conntrack_count": 18_420, "net.netfilter.nf_conntrack_max": 262_144}
    monkeypatch.setattr("dataplane.web.viewing.read_sysctl", counted.get)
    with staged(tmp_path, Traffic()) as stage:
        for page in opened(browser, stage, DESK):
            page.get_by_role("button", name="default/hostnames:http").click()
            expect(page.locator("#chart canvas")).to_have_count(1)
            shown = (".tile b", ".service .share", "#one-rows .tag", "#chart canvas", "#partial-bins i", "#health")
            for selector in shown:
                assert page.locator(selector).first.is_visible(), selector
            if PICTURES:
                page.wait_for_timeout(90_000)
                page.mouse.move(5, 5)
                PICTURE.parent.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=PICTURE)
    assert PICTURE.read_bytes().startswith(b"\x89PNG")
    assert PICTURE.stat().st_size <= 300_000
