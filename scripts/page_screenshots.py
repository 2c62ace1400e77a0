"""Pictures of the page for docs/: `page_screenshots.py RUN_FOLDER`, after `bash quickstart.sh`.

Serves what the quickstart trained, drives Chromium with Playwright and writes docs/page_light.png,
docs/page_dark.png and docs/page_narrow.png. The products are the generated sample's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from recformer.files import UserError

ROOT = Path(__file__).resolve().parent.parent
USER = 7


def main() -> None:
    """Serve, look, write."""
    from playwright.sync_api import expect, sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise UserError("chromium was not found: apt-get install chromium")
    run = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "quickstart_run")
    command = [sys.executable, "-m", "recformer", "serve", str(run / "head" / "best_model")]
    command += ["--beside", str(run / "recformer" / "best_model"), "--port", "0"]
    command += ["--data_path", str(next((run / "finetune_data").iterdir()))]
    with tempfile.TemporaryDirectory() as work, sync_playwright() as driver:
        command += ["--database", f"{work}/serve.sqlite3"]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert service.stdout is not None
            address = re.search(r"http://\S+", service.stdout.readline())
            if address is None:
                raise UserError("the service did not start; its own message stands above")
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for name, width, scheme in (
                ("page_light", 1280, "light"),
                ("page_dark", 1280, "dark"),
                ("page_narrow", 390, "light"),
            ):
                page = browser.new_page(
                    viewport={"width": width, "height": 860},
                    color_scheme=scheme,  # type: ignore[arg-type]
                )
                page.goto(address[0])
                page.locator("#user").fill(str(USER))
                page.locator("#user").press("Enter")
                page.wait_for_selector("#next strong")
                expect(page.locator("#items-beside .reason").first).not_to_be_empty()
                page.locator("#items-main .why").first.click()
                page.wait_for_selector("#items-main .explanation td")
                page.wait_for_timeout(500)
                page.screenshot(path=str(ROOT / "docs" / f"{name}.png"))
                page.close()
            browser.close()
        finally:
            service.terminate()
            service.wait()


if __name__ == "__main__":
    main()
