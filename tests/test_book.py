"""The built book in a real browser: every page, at phone and desktop width, light and dark.

Needs ``_build/html`` (``make book``) and Debian's Chromium; ``make test`` provides both.
"""

import functools
import http.server
import threading
from pathlib import Path
from urllib.parse import urljoin

import pytest
import yaml
from bs4 import BeautifulSoup
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build/html"
WIDTHS = {"phone": 390, "desktop": 1280}


def toc_pages():
    """Every page that _toc.yml lists, as the address of its HTML file."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    found = [toc["root"]]
    for part in toc["parts"]:
        for chapter in part["chapters"]:
            found += [chapter["file"], *(section["file"] for section in chapter.get("sections", ()))]
    return [f"{page}.html" for page in found]


PAGES = toc_pages()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    assert (HTML / "index.html").is_file(), "there is no book to look at; run make book first"
    handler = functools.partial(QuietHandler, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site):
    """``visit(page, width)`` opens a page and returns it with everything that went wrong on the way."""
    contexts = []

    def local(url):
        return url.startswith((site, "data:"))

    def open_page(address, width="desktop", scheme="light"):
        context = browser.new_context(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        troubles = []
        page.on("console", lambda said: said.type == "error" and troubles.append(f"console: {said.text}"))
        page.on("pageerror", lambda error: troubles.append(f"exception: {error}"))
        page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url}"))
        page.on("response", lambda answer: answer.status >= 400 and troubles.append(f"missing: {answer.url}"))
        page.on("request", lambda sent: local(sent.url) or troubles.append(f"third party: {sent.url}"))
        page.goto(site + address, wait_until="load")
        # MathJax typesets after the page has loaded; it says when it is done.
        page.evaluate("() => window.MathJax?.startup?.promise")
        return page, troubles

    yield open_page
    for context in contexts:
        context.close()


UNRENDERED_MATH = """
() => [...document.querySelectorAll('.math')].filter(node => !node.querySelector('mjx-container'))
      .concat([...document.querySelectorAll('mjx-merror')]).map(node => node.textContent)
"""
BAD_IMAGES = """
() => [...document.querySelectorAll('main article img:not([src$=".svg"])')].filter(image =>
      !image.complete || image.naturalWidth == 0 || image.alt.length < 40 || image.alt.includes('_images'))
      .map(image => image.src + ' alt=' + image.alt)
"""
UNNAMED_IMAGES = """
() => [...document.querySelectorAll('img')].filter(image => !image.alt).map(image => image.src)
"""
TOO_WIDE = """
() => document.documentElement.scrollWidth > document.documentElement.clientWidth + 1
      ? [...document.querySelectorAll('main *')].filter(
            node => node.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .slice(0, 3).map(node => node.outerHTML.slice(0, 120))
      : []
"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("address", PAGES)
def test_page_is_whole(visit, address, width):
    page, troubles = visit(address, width)
    assert troubles == []
    assert page.evaluate(UNRENDERED_MATH) == []
    assert page.evaluate(BAD_IMAGES) == []
    assert page.evaluate(UNNAMED_IMAGES) == []
    assert page.evaluate(TOO_WIDE) == []
    assert page.locator("main article h1").count() == 1


def test_dark_pages_keep_their_figures_on_white(visit):
    page, troubles = visit("notebooks/01_clipping.html", scheme="dark")
    assert page.evaluate("() => document.documentElement.dataset.theme") == "dark"
    assert troubles == []
    # The corner of a figure is its background: opaque and white, whatever the page is.
    corners = page.evaluate(
        """() => [...document.querySelectorAll('main article img[src$=".png"]')].map(image => {
            const canvas = document.createElement('canvas');
            canvas.width = canvas.height = 1;
            canvas.getContext('2d').drawImage(image, 0, 0, 2, 2, 0, 0, 1, 1);
            return [...canvas.getContext('2d').getImageData(0, 0, 1, 1).data];
        })"""
    )
    assert corners
    assert all(corner == [255, 255, 255, 255] for corner in corners)


def test_internal_links_lead_somewhere(site):
    """Every link between pages, with its anchor, on every page; Sphinx checks only those it made itself."""
    anchors = {}
    links = set()
    for address in PAGES:
        # A browser would take two seconds for each page, to typeset formulas that have no links.
        page = BeautifulSoup((HTML / address).read_text(encoding="utf-8"), "html.parser")
        anchors[address] = {node["id"] for node in page.select("[id]")}
        links |= {urljoin(site + address, node["href"]) for node in page.select("main a[href]")}
    assert len([link for link in links if link.startswith(site) and "#" in link]) > len(PAGES)
    broken = []
    for link in links:
        if link.startswith(site):
            address, _, anchor = link.removeprefix(site).partition("#")
            if address in anchors:
                if anchor and anchor not in anchors[address]:
                    broken.append(link)
            elif not (HTML / address).is_file():
                broken.append(link)
    assert broken == []


def test_search_finds_a_page(visit):
    page, troubles = visit("search.html?q=clipping")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    assert page.locator("#search-results li a").count() >= 3
    assert troubles == []


def test_colab_button_opens_the_committed_notebook(visit):
    page, _ = visit("notebooks/01_clipping.html")
    links = page.evaluate(
        "() => [...document.querySelectorAll('a[href*=\"colab.research\"]')].map(node => node.href)"
    )
    assert links
    assert all("/blob/main/notebooks/01_clipping.ipynb" in link for link in links)
    assert (ROOT / "notebooks/01_clipping.ipynb").is_file()


def test_setup_cells_stay_out_of_the_book(visit):
    page, _ = visit("notebooks/01_clipping.html")
    text = page.inner_text("main")
    assert "google.colab" not in text
    assert "injected" not in text.lower()
