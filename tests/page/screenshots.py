"""Pictures of the real page with the samples in it, for the documentation.

python -m tests.page.screenshots [--out docs/images]

Look at them before you commit them: they are what people see of the project first.
"""

import io
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from tests.page.conftest import PHONE, Screen, launched, questions
from tests.service import RunningService

MOST_BYTES = 150_000
LUNCH = "From now on the school children get a hot lunch every day"
TRAIN = "The train is late because a tree fell on the line"


def main(out: Annotated[Path, typer.Option(help="Where they go.")] = Path("docs/images")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        RunningService(Path(folder)) as service,
        launched() as browser,
    ):
        service.start()

        def opened(address: str = "", **context: Any) -> Screen:
            settings = {"locale": "en-GB", "viewport": {"width": 1000, "height": 760}} | context
            page = browser.new_context(device_scale_factor=1.5, **settings).new_page()
            return Screen(page, f"http://127.0.0.1:{service.port}").open(address)

        screen = opened()
        screen.button("Add the samples").click()
        screen.page.locator(".upload.ready").nth(1).wait_for()
        save(screen, out / "page-uploads.png")
        screen.uploaded(21, of=21)
        screen.page.locator("#uploads .clear").evaluate("one => one.click()")
        screen.open()
        search(screen, LUNCH, "en")
        save(screen, out / "page-search.png")
        screen.open("?view=library")
        screen.page.locator(".row").first.wait_for()
        save(screen, out / "page-library.png")
        persian = opened(locale="fa-IR")
        search(persian, questions()[0]["q"], "fa")
        save(persian, out / "page-persian.png")
        phone = opened(viewport=PHONE, color_scheme="dark", is_mobile=True, has_touch=True)
        search(phone, TRAIN, "en")
        save(phone, out / "page-phone.png")


def search(screen: Screen, question: str, lang: str) -> None:
    """Asks, and waits until all that is in sight is drawn."""
    screen.page.locator("select[name=lang]").first.select_option(lang)
    screen.ask(question)
    screen.page.locator(".hit .drawn path").nth(1).wait_for()
    screen.page.locator("#q").blur()


def save(screen: Screen, path: Path) -> None:
    """With as many colours as there is room for."""
    picture = Image.open(io.BytesIO(screen.page.screenshot(animations="disabled"))).convert("RGB")
    for colours in (256, 64, 32):
        picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            break
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
