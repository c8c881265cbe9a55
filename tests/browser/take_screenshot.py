"""Take the README's picture of the page: `PYTHONPATH=. python tests/browser/take_screenshot.py FILE`."""

import io
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.browser.conftest import CHROMIUM, FLAGS, ROOT, wait_for

PORT = 7877


def main() -> None:
    """Serve the embedded model, look at its first example, and store what is seen."""
    app = subprocess.Popen([sys.executable, "app.py", "--port", str(PORT)], cwd=ROOT)
    try:
        wait_for(f"http://127.0.0.1:{PORT}/", app)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
            page = browser.new_page(viewport={"width": 1400, "height": 1180}, color_scheme="light")
            page.goto(f"http://127.0.0.1:{PORT}/")
            page.wait_for_selector(".id-badge.ready", timeout=120_000)
            page.wait_for_selector(".id-overlay:not([hidden])")
            page.wait_for_timeout(1000)
            shot = page.screenshot()
            browser.close()
    finally:
        app.terminate()
        app.wait(20)
    target = Path(sys.argv[1])
    Image.open(io.BytesIO(shot)).save(target, quality=82, method=6)
    sys.stdout.write(f"{target}: {target.stat().st_size // 1024} kB\n")


if __name__ == "__main__":
    main()
