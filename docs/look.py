"""Open every page of the built site in chromium and leave pictures of it; fails where something is wrong.

    python docs/look.py SITE PICTURES

Wrong is a page that scrolls sideways, a picture that does not show, and anything fetched from elsewhere. Run by
``make docs-look``.
"""

from __future__ import annotations

import functools
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTHS = (400, 1280)
SCHEMES = ("light", "dark")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The site's address on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def look(page: Page, address: str, picture: Path) -> list[str]:
    """What is wrong with a page; leaves a picture of all of it."""
    page.goto(address)
    page.evaluate("for (const i of document.images) i.loading = 'eager'")
    page.wait_for_load_state("networkidle")
    wrong = page.evaluate(
        "[...document.images].filter(i => !i.naturalWidth).map(i => `picture ${i.src} does not show`)"
    )
    width = page.evaluate("document.documentElement.scrollWidth")
    if width > page.viewport_size["width"]:
        wrong.append(f"{width} pixels wide")
    page.screenshot(path=picture, full_page=True)
    return wrong


def main(site: Path, pictures: Path) -> None:
    pictures.mkdir(parents=True, exist_ok=True)
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    if not names:
        sys.exit(f"no page in {site}")
    found = []
    with served(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width in WIDTHS:
            for scheme in SCHEMES:
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                fetched: list[str] = []
                page.on("request", lambda request, fetched=fetched: fetched.append(request.url))
                for name in names:
                    picture = pictures / f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png"
                    wrong = look(page, address + name, picture)
                    wrong += [f"fetches {url}" for url in fetched if not url.startswith((address, "data:"))]
                    found += [f"{name}, {width} pixels, {scheme}: {what}" for what in wrong]
                    fetched.clear()
                page.close()
    print("\n".join(found) or f"{len(names)} pages look right; see {pictures}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
