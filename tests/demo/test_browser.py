"""The page in a real browser: it answers, its cursor links what it shows, and it takes examples, uploads and settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest

pytest.importorskip("playwright", reason="needs the extra `dev`")

from browsing import NARROW, SLOW_MACHINE, WIDE, opened, says, told, upload
from PIL import Image
from playwright.sync_api import Browser, Page, expect

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def visit(browser: Browser, page: str) -> Iterator[Page]:
    """One visitor's page, on which the tests build."""
    with opened(browser, page, permissions=["clipboard-read", "clipboard-write"]) as tab:
        yield tab


def scrubber(tab: Page) -> tuple[int, int]:
    """The step of the cursor and the last one."""
    slider = tab.get_by_role("slider", name="Solver step", exact=True)
    return int(slider.input_value()), int(slider.get_attribute("max") or 0)


def test_opens_on_a_solved_photo(visit: Page) -> None:
    assert re.fullmatch(r"Settled after \d+ steps: .+ %, residual \d\.\de-?\d+", told(visit))
    assert visit.locator("#pg-answer .pg-bars li").count() == 5
    assert visit.locator("#pg-photo img").count() >= 1
    assert visit.get_by_role("img", name="Relative residual after each solver step").is_visible()
    assert visit.get_by_role("img", name="Probability of the leading classes after each step").is_visible()
    assert visit.locator("#pg-maps canvas").count() == 4  # two rows of two resolutions
    step, last = scrubber(visit)
    assert step == last > 1


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_answer_is_above_the_fold(visit: Page, size: dict[str, int]) -> None:
    visit.set_viewport_size(size)  # pyright: ignore[reportArgumentType]
    visit.wait_for_timeout(300)
    visit.evaluate("window.scrollTo(0, 0)")
    for part in (".pg-bars", ".pg-player"):
        box = visit.locator(f"#pg-answer {part}").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= size["height"], (part, box)
    assert visit.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for name in ("Watch", "Compare", "Gradient", "Nearby", "Python"):
        assert visit.get_by_role("tab", name=name).is_visible()
    visit.set_viewport_size(WIDE)  # pyright: ignore[reportArgumentType]


def test_one_cursor_links_answer_curves_and_maps_without_the_server(visit: Page) -> None:
    slider = visit.get_by_role("slider", name="Solver step", exact=True)
    asked: list[str] = []
    visit.on("request", lambda request: asked.append(request.url))

    def shown() -> tuple[object, ...]:
        return (
            told(visit),
            visit.locator("#pg-answer .pg-bars").inner_text(),
            visit.evaluate(
                "[...document.querySelectorAll('#pg-curves .pg-cursor')].map((line) => line.getAttribute('x1'))"
            ),
            visit.evaluate("[...document.querySelectorAll('#pg-maps canvas')].map((canvas) => canvas.toDataURL())"),
        )

    last = shown()
    slider.focus()
    slider.press("Home")
    first = shown()
    assert str(first[0]).startswith("Step 1: ")
    assert all(one != other for one, other in zip(first, last, strict=True))
    for key, step in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2)):
        slider.press(key)
        assert told(visit).startswith(f"Step {step}: ")
        assert slider.get_attribute("aria-valuetext") == told(visit)
    for figure in ("residual", "probability"):
        # The cursor stands on the second point of every line, and so do their ends.
        expected, found = visit.evaluate(
            """(name) => {
                const svg = document.querySelector(`#pg-curves [data-figure="${name}"] svg[role=img]`);
                const points = [...svg.querySelectorAll('.pg-line')].map((line) => line.getAttribute('points').split(' ')[1]);
                const ends = [...svg.querySelectorAll('.pg-end')].map((end) => [end.getAttribute('cx'), end.getAttribute('cy')]);
                return [[...points, points[0].split(',')[0]], [...ends.map(String), svg.querySelector('.pg-cursor').getAttribute('x1')]];
            }""",
            figure,
        )
        assert expected[:-1] == found[:-1]
        assert float(found[-1]) == pytest.approx(float(expected[-1]), abs=0.1)
    slider.press("End")
    assert shown() == last
    assert asked == []


def test_the_steps_play_and_pause(visit: Page) -> None:
    play = visit.locator("#pg-answer .pg-play")
    play.focus()
    play.press("Space")
    expect(play).to_have_text("Pause")
    says(visit, "Step 2:")
    play.press("Space")
    expect(play).to_have_text("Play")
    stopped = told(visit)
    visit.wait_for_timeout(700)
    assert told(visit) == stopped
    play.click()
    expect(play).to_have_text("Play", timeout=SLOW_MACHINE)
    step, last = scrubber(visit)
    assert step == last


def test_an_example_is_picked_by_mouse_or_keyboard(visit: Page) -> None:
    before = told(visit)
    visit.get_by_role("button", name="Chelsea the cat").click()
    expect(visit.locator("#pg-credit")).to_contain_text("Stefan van der Walt", timeout=SLOW_MACHINE)
    expect(visit.locator("#pg-answer .pg-sentence")).not_to_have_text(before)
    says(visit, "Settled after")
    visit.get_by_role("button", name="Dahlia").focus()
    visit.keyboard.press("Enter")
    expect(visit.locator("#pg-credit")).to_contain_text("vultilion", timeout=SLOW_MACHINE)
    assert visit.locator("#pg-answer .pg-bars li").count() == 5


def test_every_setting_makes_another_solve(visit: Page) -> None:
    field, slider = (visit.locator(f"#pg-steps input[type={kind}]") for kind in ("number", "range"))
    field.fill("2")
    says(visit, "Stopped after 2 steps, before its tolerance of 1e-2: ")
    slider.focus()
    slider.press("ArrowRight")
    says(visit, "Stopped after 3 steps")
    for typed, taken, text in (("0", "1", "1 step,"), ("2.6", "3", "3 steps"), ("-1e9", "1", "1 step,")):
        field.fill(typed)
        says(visit, f"Stopped after {text}")
        expect(field).to_have_value(taken)
    field.fill("")
    field.fill("99")
    expect(field).to_have_value("60", timeout=SLOW_MACHINE)
    says(visit, "Settled after")
    plain = scrubber(visit)[1]
    visit.locator("#pg-tolerance").get_by_label("1e-4").check()
    expect(visit.locator("#pg-curves")).to_contain_text("tolerance 1e-4", timeout=SLOW_MACHINE)
    says(visit, "Settled after")
    assert scrubber(visit)[1] > plain
    visit.locator("#pg-solver").get_by_label("Anderson").focus()
    visit.keyboard.press("Space")
    visit.wait_for_function("document.documentElement.dataset.python.includes('solver=Anderson(')")
    says(visit, "Settled after")


def test_a_link_restores_example_and_settings(visit: Page, browser: Browser, page: str) -> None:
    visit.locator("#pg-steps input[type=number]").fill("3")
    says(visit, "Stopped after 3 steps")
    visit.get_by_role("button", name="Copy a link to this").click()
    expect(visit.get_by_role("button", name="Copied")).to_be_visible()
    link = visit.evaluate("navigator.clipboard.readText()")
    assert parse_qs(urlsplit(link).query) == {
        "example": ["flower"],
        "solver": ["Anderson"],
        "steps": ["3"],
        "tolerance": ["0.0001"],
        "damping": ["0.7"],
    }
    with opened(browser, link) as tab:
        expect(tab.locator("#pg-answer .pg-sentence")).to_have_text(told(visit), timeout=SLOW_MACHINE)
        expect(tab.locator("#pg-credit")).to_contain_text("vultilion")
        expect(tab.locator("#pg-steps input[type=number]")).to_have_value("3")
        assert tab.locator("#pg-solver").get_by_label("Anderson").is_checked()
        assert tab.locator("#pg-tolerance").get_by_label("1e-4").is_checked()
    nonsense = f"{page}?example=flower&solver=Anderson&steps=1e99&tolerance=x&damping=%00"
    with opened(browser, nonsense) as tab:
        says(tab, "Settled after")
        expect(tab.locator("#pg-credit")).to_contain_text("vultilion", timeout=SLOW_MACHINE)
        expect(tab.locator("#pg-steps input[type=number]")).to_have_value("60")
    with opened(browser, f"{page}?example=/etc/passwd") as tab:
        expect(tab.get_by_text("The example of this link does not exist")).to_be_visible(timeout=SLOW_MACHINE)


def test_the_python_is_copied(visit: Page) -> None:
    visit.locator(".pg-share [data-copy=python]").click()
    expect(visit.locator(".pg-share [data-copy=python]")).to_have_text("Copied")
    code = visit.evaluate("navigator.clipboard.readText()")
    compile(code, "snippet", "exec")
    assert "solver=Anderson(max_steps=3, rtol=0.0001)" in code
    visit.get_by_role("tab", name="Python").click()
    expect(visit.get_by_role("region", name="Python code")).to_have_text(code)
    visit.get_by_role("tab", name="Watch").click()
    visit.locator("#pg-steps input[type=number]").fill("60")
    says(visit, "Settled after")


def test_figures_are_saved_as_svg(visit: Page, tmp_path: Path) -> None:
    for name in ("residual", "probability", "maps"):
        figure = visit.locator("#pg-maps" if name == "maps" else f"#pg-curves [data-figure={name}]")
        with visit.expect_download() as started:
            figure.get_by_role("button", name="Save the figure as SVG").click()
        assert started.value.suggested_filename == f"phantomgrad-{name}.svg"
        started.value.save_as(tmp_path / name)
        root = ElementTree.parse(tmp_path / name).getroot()
        assert root.tag == f"{SVG}svg"
        if name == "maps":
            assert any(re.search(r"size, \d+ x \d+: ", text.text or "") for text in root.iter(f"{SVG}text"))
            assert [image.get("href", "")[:15] for image in root.iter(f"{SVG}image")] == ["data:image/png;"] * 4
            continue
        lines = list(root.iter(f"{SVG}polyline"))
        assert len(lines) >= 3
        # What the page writes beside the drawing is in it: the title and the name of every line.
        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert {*figure.locator(".pg-legend li").all_inner_texts()} <= {*texts}
        assert figure.locator("figcaption").inner_text().splitlines()[0] in texts
        # It looks the same without the page's style sheet.
        assert all("stroke: rgb(" in (line.get("style") or "") for line in lines)


def test_classes_can_be_searched(visit: Page) -> None:
    visit.get_by_text("classes this model knows").click()
    visit.get_by_role("searchbox", name="Search").fill("cat")
    listed = visit.locator("#pg-classes li:visible")
    expect(listed).to_have_count(1)
    assert listed.inner_text() == "tabby cat"
    expect(visit.locator("#pg-classes output")).to_have_text("1 shown")


@pytest.mark.parametrize(
    ("tab", "place", "takeaway", "result"),
    [
        ("Compare", "#pg-compared", r"(The same answer|Different answers): A ", "Residual of both settings"),
        ("Gradient", "#pg-gradient", r"map, 5 products instead of \d+: the Neumann", "cosine"),
        ("Nearby", "#pg-nearby", r"\d+ steps? from ", "from the old equilibrium"),
    ],
)
def test_each_tab_opens_with_its_takeaway(visit: Page, tab: str, place: str, takeaway: str, result: str) -> None:
    visit.get_by_role("button", name="Coffee cup").click()
    expect(visit.locator("#pg-credit")).to_contain_text("Rachel Michetti", timeout=SLOW_MACHINE)
    visit.get_by_role("tab", name=tab).click()
    expect(visit.locator(place)).to_contain_text(result, timeout=SLOW_MACHINE)
    shown = visit.locator(".pg-takeaway:visible")
    expect(shown).to_have_text(re.compile(takeaway))
    above = visit.locator(".pg-controls:visible").first.bounding_box()
    words = shown.bounding_box()
    assert above is not None
    assert words is not None
    assert words["y"] < above["y"]
    # Another photo takes the result away, which is not its own.
    visit.get_by_role("button", name="Rocket launch").click()
    expect(visit.locator(f"{place} figure").first).to_be_hidden(timeout=SLOW_MACHINE)
    visit.get_by_role("tab", name="Watch").click()
    expect(visit.locator("#pg-curves svg[role=img]")).to_have_count(2)


def test_a_text_file_named_jpg_gets_a_message(visit: Page, tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_text("just some text")
    upload(visit, path)
    says(visit, "not a photo in a known format")
    assert str(tmp_path) not in visit.content()
    assert visit.locator("#pg-photo img").count() == 0
    assert not visit.locator("#pg-answer .pg-player").is_visible()
    assert not visit.locator("#pg-curves svg").first.is_visible()
    visit.locator("#pg-steps input[type=number]").fill("5")
    visit.wait_for_timeout(500)
    assert "not a photo in a known format" in told(visit)


def test_without_a_photo_there_is_no_answer(visit: Page) -> None:
    visit.get_by_role("button", name="Chelsea the cat").click()
    says(visit, "after")
    visit.locator("#pg-photo").get_by_role("button", name="Remove Image").click()
    says(visit, "Choose, drop")
    assert not visit.locator("#pg-maps").is_visible()
    visit.get_by_role("tab", name="Gradient").click()
    expect(visit.locator(".pg-takeaway:visible")).to_contain_text("Choose, drop", timeout=SLOW_MACHINE)
    visit.get_by_role("tab", name="Watch").click()


def test_an_uploaded_photo_is_answered(visit: Page, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.effect_noise((300, 200), 80).save(path)
    upload(visit, path)
    says(visit, "after")
    expect(visit.locator("#pg-credit")).to_be_empty()
    # A photo of a visitor's own is in no link.
    expect(visit.get_by_role("button", name="Copy a link to this")).to_be_hidden()


def test_a_photo_is_chosen_by_a_button_with_a_name(visit: Page, tmp_path: Path) -> None:
    path = tmp_path / "chosen.png"
    Image.effect_noise((80, 60), 60).save(path)
    visit.get_by_role("button", name="Coffee cup").click()
    expect(visit.locator("#pg-credit")).to_contain_text("Rachel Michetti", timeout=SLOW_MACHINE)
    with visit.expect_file_chooser() as chooser:
        visit.get_by_role("button", name="Your photo").click()
    chooser.value.set_files(str(path))
    expect(visit.locator("#pg-credit")).to_have_text("", timeout=SLOW_MACHINE)
    says(visit, "after")


def test_a_photo_is_pasted_wherever_the_focus_is(visit: Page) -> None:
    visit.get_by_role("button", name="Coffee cup").click()
    expect(visit.locator("#pg-credit")).to_contain_text("Rachel Michetti", timeout=SLOW_MACHINE)
    says(visit, "after")
    before = told(visit)
    visit.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement('canvas'), { width: 40, height: 30 });
            canvas.getContext('2d').fillRect(5, 5, 20, 10);
            const file = new File([await new Promise((done) => canvas.toBlob(done))], 'pasted.png', { type: 'image/png' });
            const clipboardData = new DataTransfer();
            clipboardData.items.add(file);
            document.body.dispatchEvent(new ClipboardEvent('paste', { clipboardData, bubbles: true }));
        }"""
    )
    expect(visit.locator("#pg-credit")).to_have_text("", timeout=SLOW_MACHINE)
    expect(visit.locator("#pg-answer .pg-sentence")).not_to_have_text(before)


def test_arrow_keys_move_within_a_choice(visit: Page) -> None:
    solvers = visit.locator("#pg-solver")
    solvers.get_by_label("fixed point").check()
    visit.wait_for_function("document.documentElement.dataset.python.includes('solver=FixedPointIteration(')")
    solvers.get_by_label("fixed point").focus()
    visit.keyboard.press("ArrowRight")
    expect(solvers.get_by_label("Anderson")).to_be_checked()
    visit.wait_for_function("document.documentElement.dataset.python.includes('solver=Anderson(')")
    assert visit.evaluate("getComputedStyle(document.activeElement.closest('label')).outlineStyle") == "solid"


def test_a_field_that_is_left_empty_gets_a_number_and_its_answer(visit: Page) -> None:
    field = visit.locator("#pg-steps input[type=number]")
    field.fill("3")
    says(visit, "3 steps")
    field.fill("")
    field.blur()
    expect(field).not_to_have_value("", timeout=SLOW_MACHINE)
    taken = int(field.input_value())
    visit.wait_for_function(f"document.documentElement.dataset.python.includes('max_steps={taken},')")
