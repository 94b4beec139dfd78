"""The page in a browser: what people do with it, and what happens to them. The model is a stand-in."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.page.conftest import PHONE, Screen, questions, sample
from tests.service import RunningService, clasp, eventually

Open = Callable[..., Screen]
WORDS = "import('/page/words.js').then(({WORDS}) => WORDS)"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One for all tests, in their order: empty at first, with keys at last."""
    with RunningService(tmp_path_factory.mktemp("page"), program="tests.stand_in") as running:
        yield running.start()
        assert "unexpected error" not in running.log()


def connection(screen: Screen) -> Callable[[int], None]:
    """Makes the connection send no more than so many bytes a second, or, with -1, as many as it can."""
    tools = screen.page.context.new_cdp_session(screen.page)
    tools.send("Network.enable")
    limits = {"offline": False, "latency": 0, "downloadThroughput": -1}
    return lambda sent: tools.send("Network.emulateNetworkConditions", limits | {"uploadThroughput": sent})


# --- the first minute


def test_an_empty_library_offers_the_samples_and_then_questions_to_ask(screen: Screen) -> None:
    """Who has no recording at hand sees in a minute what this is, in their own language."""
    screen.see("Let’s hear something")
    screen.button("Add the samples").click()
    screen.uploaded(21, of=21)
    chips = screen.page.get_by_role("list", name="Try one of these").get_by_role("link")
    languages = len({question["lang"] for question in questions()})
    chips.nth(languages - 1).wait_for()
    assert chips.count() == languages >= 5
    chips.first.click()
    screen.page.locator(".hit").first.wait_for()
    assert screen.page.get_by_role("searchbox").input_value() == questions()[0]["q"]
    screen.page.go_back()
    screen.see("Try one of these")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(screens: Open, scheme: str) -> None:
    """People read it by ear, by keyboard, or in high contrast; in both colours and both directions."""
    screen = screens(color_scheme=scheme, locale="fa-IR" if scheme == "dark" else "en-GB")
    found = []
    for address in ("?q=train&lang=en&limit=3", "?view=library&lang=it", "?record=en-bees&of=default"):
        screen.open(address)
        screen.page.locator(".hit, .row, .record dl").first.wait_for()
        found += screen.violations()
    screen.page.keyboard.press("Escape")
    screen.page.locator(".tools .add").click()
    found += screen.violations()
    assert found == []


@pytest.mark.parametrize("locale", ["en", "fa"])
def test_on_a_phone_nothing_is_wider_than_the_screen(screens: Open, locale: str) -> None:
    """What must be scrolled sideways is lost on a phone, and half of the world searches on one."""
    screen = screens(viewport=PHONE, locale=locale, has_touch=True, is_mobile=True)
    wide = []
    for address in (
        "",
        "?q=train&lang=en",
        "?view=library",
        "?view=library&record=en-village-news&of=default",
    ):
        screen.open(address)
        screen.page.locator(".hit, .row, .chips, .record dl").first.wait_for()
        if not screen.is_as_wide_as_the_screen():
            wide.append(address)
    assert wide == []
    assert screen.page.locator("html").get_attribute("dir") == {"en": "ltr", "fa": "rtl"}[locale]


def test_every_language_has_all_words(screen: Screen) -> None:
    """A word that lacks is an error in the face of somebody whose language nobody here reads."""
    words = screen.page.evaluate(WORDS)
    names = {lang: set(said) for lang, said in words.items()}
    assert names["fa"] == names["en"]
    for name, said in words["en"].items():
        blanks = [set(re.findall(r"{\w+}", json.dumps(words[lang][name]))) for lang in names]
        assert all(blank == blanks[0] for blank in blanks), (name, said)


# --- asking


def test_a_question_in_persian_mirrors_nothing_of_the_english_page_but_itself(screen: Screen) -> None:
    """Languages meet on one page: each text runs its own way, whatever the page's is."""
    screen.ask("قطار چهل دقیقه تأخیر دارد")
    box = screen.page.get_by_role("searchbox")
    assert box.evaluate("box => getComputedStyle(box).direction") == "rtl"
    assert screen.page.locator("html").get_attribute("dir") == "ltr"
    address = screen.page.url
    screen.page.get_by_role("combobox", name="Language of this page").select_option("fa")
    screen.see("جست‌وجو")
    screen.page.locator(".hit").first.wait_for()
    assert screen.page.locator("html").get_attribute("dir") == "rtl"
    # the brand stands where reading begins; time runs as it does on every player
    assert screen.page.locator(".brand").bounding_box()["x"] > 600
    assert screen.page.locator(".waveform").first.evaluate("one => getComputedStyle(one).direction") == "ltr"
    screen.page.reload()
    assert screen.page.url == address
    screen.see(re.compile("۱۰ ضبط"))


def test_a_search_is_an_address(screen: Screen) -> None:
    """What somebody found they send to somebody else, and find again tomorrow."""
    screen.page.get_by_role("combobox", name="Language of the question").select_option("de")
    screen.ask('zug & "baum" <b>')
    screen.open(screen.page.url.removeprefix(screen.url + "/"))
    screen.page.locator(".hit").first.wait_for()
    assert screen.page.get_by_role("searchbox").input_value() == 'zug & "baum" <b>'
    assert screen.page.get_by_role("combobox", name="Language of the question").input_value() == "de"


def test_without_a_calibration_probable_hits_are_no_choice(screen: Screen) -> None:
    """The page must not show nothing because a model's scores were never measured."""
    screen.forgive("422")
    screen.ask("train")
    screen.page.get_by_role("checkbox", name="Only probable hits").click()
    screen.page.locator("[name=probable]:disabled").wait_for()
    screen.page.locator(".hit").first.wait_for()


def test_all_of_it_goes_without_a_mouse(screen: Screen) -> None:
    """Some people have only a keyboard, and those who search all day want only one."""
    keys = screen.page.keyboard
    screen.page.locator("main").focus()
    keys.press("/")
    keys.type("train")
    keys.press("Enter")
    screen.page.locator(".hit").nth(1).wait_for()
    keys.press("ArrowDown")
    keys.press("j")
    focused = screen.page.locator(".hit:focus")
    assert focused.get_attribute("aria-labelledby") == "hit-2"
    keys.press("k")
    keys.press("Space")
    screen.page.locator(".hit:focus .play[data-playing=true]").wait_for()
    keys.press("Escape")
    screen.page.locator(".hit:focus .play[data-playing=false]").wait_for()
    keys.press("Enter")
    screen.page.locator(".record dl").wait_for()
    keys.press("Escape")
    screen.page.locator(".record").wait_for(state="detached")
    assert "record" not in screen.page.url
    keys.press("m")
    screen.see(re.compile("More like"))
    keys.press("?")
    screen.page.get_by_role("dialog", name="Keyboard").wait_for()
    keys.press("Escape")
    screen.page.locator(".hit").first.wait_for()
    keys.press("/")
    assert screen.page.get_by_role("searchbox").evaluate("box => box === document.activeElement")


def test_a_passage_is_marked_played_and_can_be_widened(screen: Screen) -> None:
    """The second where it is said is the answer; what came before and after is one click away."""
    hit = screen.ask("train").filter(has=screen.page.get_by_role("heading", name="Village news"))
    mark = hit.locator(".overview .mark").first
    mark.click()
    hit.locator(".head:visible").first.wait_for()
    started = int(hit.locator(".slider").first.get_attribute("aria-valuenow"))
    start, _ = re.findall(r"(\d+):(\d\d)", mark.get_attribute("aria-label"))
    assert abs(60 * int(start[0]) + int(start[1]) - started) <= 3
    hit.get_by_role("button", name=re.compile("5 s before")).click()
    hit.locator(".play[data-playing=true]").wait_for()
    hit.locator(".score summary").click()
    screen.see(re.compile("cosine"))


# --- by voice


def test_a_microphone_that_is_not_lent_is_said_so(screens: Open) -> None:
    """A button that does nothing leaves people alone with it."""
    screen = screens(lent=False)
    screen.button(re.compile("Ask by voice")).click()
    screen.see(re.compile("may not use the microphone"))


def test_what_is_recorded_becomes_a_recording(screen: Screen) -> None:
    """A note to oneself is a recording, too; and pressing twice is enough, without holding."""
    screen.button("Add recordings").click()
    dialog = screen.page.get_by_role("dialog", name="Add recordings")
    dialog.get_by_label("Collection").fill("notes")
    dialog.get_by_role("button", name="Record").click()
    dialog.get_by_role("button", name=re.compile("Stop and add · 0:02")).click()
    screen.uploaded(1, of=1)
    screen.open("?view=library&collection=notes")
    assert screen.page.locator(".row h2").inner_text().startswith("Recording of ")
    screen.page.locator(".row .play").click()
    screen.page.locator(".row .play[data-playing=true]").wait_for()


# --- uploads


def test_what_cannot_be_indexed_says_why_and_under_which_number(
    screen: Screen, service: RunningService
) -> None:
    """People drop the wrong file all the time; what matters is that they learn it is the wrong one."""
    screen.drop({"letter.txt": b"Dear reader, this is no recording.", "bees again.opus": sample("en-bees")})
    screen.page.locator(".upload.failed").get_by_text(re.compile("not sound in a format")).first.wait_for()
    screen.page.locator(".upload.duplicate").wait_for()
    (first,) = service.listed(status="failed")
    screen.page.locator(".upload.failed").get_by_role("button", name="Try again").click()
    eventually(
        lambda: [one["id"] for one in service.listed(status="failed")] not in ([], [first["id"]]), within_s=20
    )
    screen.page.locator(".upload.failed").wait_for()
    screen.button("Clear finished").click()
    screen.page.locator("#uploads").wait_for(state="hidden")
    # an error of the service itself, not of a recording, has its number in the log
    screen.forgive("422")
    screen.page.locator("main").focus()
    screen.open("?q=train&lang=no+language")
    screen.page.locator(".trouble").get_by_text(re.compile("Request [0-9a-f]{32}")).wait_for()


def test_a_folder_gives_its_recordings(screen: Screen, tmp_path: Path) -> None:
    """Archives come as folders, with lists and pictures between."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "doctor.opus").write_bytes(sample("en-doctor"))
    (tmp_path / "deep" / "list.csv").write_text("doctor,1")
    screen.button("Add recordings").click()
    dialog = screen.page.get_by_role("dialog")
    dialog.get_by_label("Collection").fill("archive")
    dialog.get_by_label("Spoken language").select_option("en")
    with screen.page.expect_file_chooser() as chooser:
        dialog.get_by_role("button", name="Choose a folder").click()
    chooser.value.set_files(tmp_path / "deep")
    screen.uploaded(1, of=1)
    screen.see("1 file of the folder is no recording and was left out.")
    screen.open("?view=library&collection=archive&lang=en&title=doctor.opus")
    screen.page.locator(".row h2").get_by_text("doctor.opus").wait_for()
    assert screen.page.locator(".row").count() == 1


def test_a_reload_during_uploads_loses_nothing_silently(screen: Screen, service: RunningService) -> None:
    """Pages are closed, tabs crash: what arrived goes on; what did not is named until it is given again."""
    asked: list[str] = []
    screen.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    limit = connection(screen)
    limit(100_000)
    news = sample("en-village-news") + b"\0"  # other bytes than those that are there already
    files = {
        "small.opus": sample("en-bicycle") + b"\0",
        "news.opus": news,
        "late.opus": sample("fr-lift") + b"\0",
    }
    screen.drop(files)
    screen.page.locator(".upload.ready").first.wait_for()
    screen.page.locator(".upload.sending").get_by_text(re.compile(r"[1-9]\d?\s?%")).first.wait_for()
    screen.page.reload()
    assert asked == ["beforeunload"]
    rows = screen.page.locator(".upload")
    rows.nth(2).wait_for()
    interrupted = screen.page.locator(".upload.interrupted")
    assert "news.opus" in interrupted.locator(".name").all_inner_texts()
    lost = {name: files[name] for name in interrupted.locator(".name").all_inner_texts()}
    limit(-1)
    screen.drop(lost)
    screen.uploaded(3, of=3)
    listed = [record["metadata"].get("title") for record in service.listed()]
    assert all(listed.count(name) == 1 for name in files)


def test_without_a_connection_it_waits_and_goes_on(screen: Screen) -> None:
    """Trains have tunnels. Nobody should have to press anything when they end."""
    screen.forgive("ERR_INTERNET_DISCONNECTED")
    screen.page.context.set_offline(True)
    screen.drop({"offline.opus": sample("it-grapes") + b"\0"})
    screen.see(re.compile("cannot be reached"))
    screen.page.locator(".upload.lost").wait_for()
    screen.page.context.set_offline(False)
    screen.uploaded(1, of=1)
    assert screen.page.get_by_role("alert").filter(has_text="reached").is_hidden()


# --- the library


def test_records_are_changed_only_as_they_were_seen(screen: Screen, service: RunningService) -> None:
    """Two people with one archive must not undo each other's work without a word."""
    screen.forgive("412")
    screen.open("?view=library&record=en-bees&of=default")
    title = screen.page.get_by_label("Title", exact=True)
    title.fill("Bees in <winter>")
    screen.button("Save").click()
    screen.see("Saved.")
    screen.page.locator(".rows").get_by_text("Bees in <winter>").wait_for()
    patch = {"Content-Type": "application/merge-patch+json"}
    service.client.patch("/audio/en-bees", content=b'{"lang": "en-GB"}', headers=patch).raise_for_status()
    title.fill("Mine")
    screen.button("Save").click()
    screen.see(re.compile("Somebody changed it"))
    assert service.client.get("/audio/en-bees").json()["metadata"]["title"] == "Bees in <winter>"


def test_what_is_deleted_is_gone_after_a_question_and_a_count(
    screen: Screen, service: RunningService
) -> None:
    """Nothing goes by a slip of the hand: one is asked for by its title, many by their number."""
    screen.open("?view=library&record=en-doctor&of=default")
    screen.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    screen.page.get_by_role("dialog", name=re.compile("Delete “Doctor”")).get_by_role(
        "button", name="Delete"
    ).click()
    screen.page.locator("dialog").first.wait_for(state="detached")
    assert "en-doctor" not in {record["id"] for record in service.listed(collection="default")}

    screen.forgive("404")
    screen.open("?record=en-doctor&of=default")
    screen.see(re.compile("not here, or not any more"))

    kept = len(service.listed())
    screen.open("?view=library&collection=notes")
    screen.page.locator(".row").wait_for()
    screen.button("Delete these…").click()
    dialog = screen.page.get_by_role("dialog", name="Delete 1 recording?")
    dialog.get_by_role("button", name="Cancel").click()
    assert len(service.listed()) == kept
    screen.button("Delete these…").click()
    dialog.get_by_role("button", name="Delete").click()
    dialog.wait_for(state="detached")
    assert service.listed(collection="notes") == []
    assert len(service.listed()) == kept - 1


# --- keys; from here on the service has some


@pytest.fixture(scope="module")
def keys(service: RunningService) -> dict[str, str]:
    wanted = {"reader": ("read",), "busy": ("read,write", "--rate", "3/second")}
    texts = {}
    for name, scope in wanted.items():
        done = clasp("keys", "create", name, "--scope", *scope, "--json", cwd=service.data_dir)
        texts[name] = json.loads(done.stdout)["key"]
    return texts


def sign_in(screen: Screen, key: str) -> None:
    screen.forgive("401")
    screen.page.reload()
    screen.page.get_by_label("Key", exact=True).fill(key)
    screen.button("Use this key").click()


def test_a_key_opens_what_it_may_and_no_script_can_read_it(screen: Screen, keys: dict[str, str]) -> None:
    """A key that a script can read is a key that an injected script can send away."""
    sign_in(screen, "no-such-key")
    screen.see("This key is not valid (any more).")
    screen.page.get_by_label("Key", exact=True).fill(keys["reader"])
    screen.button("Use this key").click()
    screen.page.get_by_role("dialog", name="API key").wait_for(state="detached")
    screen.ask("train").first.locator("button.play").click()
    screen.page.locator(".play[data-playing=true]").first.wait_for()
    assert (
        screen.page.evaluate(
            "document.cookie + JSON.stringify(localStorage) + JSON.stringify(sessionStorage)"
        ).count(keys["reader"])
        == 0
    )
    assert screen.button("Add recordings").is_hidden()
    screen.open("?view=library&record=en-bees&of=default")
    screen.page.locator(".record dl").wait_for()
    assert screen.page.get_by_role("button", name=re.compile("Delete|Save")).count() == 0
    screen.page.keyboard.press("Escape")
    screen.button("API key").click()
    screen.button("Forget the key").click()
    screen.page.get_by_role("dialog", name="API key").wait_for()


def test_a_busy_service_is_waited_for(screen: Screen, keys: dict[str, str]) -> None:
    """A folder of a thousand recordings must not become nine hundred failures for a rate limit."""
    screen.forgive("429")
    sign_in(screen, keys["busy"])
    screen.see("Try one of these")
    screen.drop({f"{at}.opus": sample("es-bread") + bytes([at]) for at in range(1, 7)})
    screen.uploaded(6, of=6)
    assert any("429" in one for one in screen.complaints)
