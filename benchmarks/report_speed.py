"""Time and size of the report for 500 examples, 10 classes and 40 snapshots, and how long a browser needs to open it.

The analysis is the tests' synthetic one: a real one of 5,000 outputs takes hours. Chromium draws 3D on the CPU here, as on any machine
without a graphics card. Times of the browser are from the start of navigation: `interactive` is when the first figure is drawn and the
page has answered again.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from ntkscope.view.report import render_report, write_report

TESTS = Path(__file__).parent.parent / "tests"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--no-first-run",
    "--window-size=1280,900",
)
REPEATS = 5
ASKED_SECONDS, ASKED_OPEN, ASKED_BYTES = 10.0, 3.0, 6_000_000


def opening_times(path: Path) -> tuple[float, float]:
    """Open the report in a fresh browser.

    Args:
        path: The report.

    Returns:
        Seconds until it is interactive, and until all figures are drawn.
    """
    options = Options()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        try:
            browser.get(path.as_uri())
            while not browser.execute_script("return document.documentElement.dataset.drawn === 'true'"):
                time.sleep(0.1)
            marks = browser.execute_script("return performance.getEntriesByType('mark').map(m => [m.name, m.startTime])")
        finally:
            browser.quit()
    return dict(marks)["interactive"] / 1000, max(at for _, at in marks) / 1000


def main() -> None:
    """Print the figures."""
    sys.path.insert(0, str(TESTS))
    from view_case import synthetic_analysis

    analysis = synthetic_analysis(num_examples=500, num_classes=10, num_snapshots=40, has_gate=True)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        page = render_report(analysis)
        times.append(time.perf_counter() - start)
    seconds, size = statistics.median(times), len(page.encode())
    print(f"report of 500 examples, 10 classes, 40 snapshots: {seconds:.1f} s (asked {ASKED_SECONDS:.0f}), {size / 1e6:.2f} MB (asked 6)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        write_report(analysis, path)
        opened = [opening_times(path) for _ in range(REPEATS)]
    interactive, drawn = (statistics.median(column) for column in zip(*opened, strict=True))
    print(f"opens: interactive after {interactive:.1f} s (asked {ASKED_OPEN:.0f}), all figures drawn after {drawn:.1f} s")
    is_good = seconds < ASKED_SECONDS and size < ASKED_BYTES and interactive < ASKED_OPEN
    print("ok" if is_good else "NO")


if __name__ == "__main__":
    main()
