"""The page's API from a program, and what the server gives away."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="needs the extra `demo`")

from conftest import serve
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from phantomgrad_demo.photos import available
from phantomgrad_hub import MDEQ


@pytest.fixture(scope="module")
def client(page: str) -> Iterator[Client]:
    client = Client(page, verbose=False)
    yield client
    client.close()


def test_classify_gives_every_class_its_probability(client: Client, model: MDEQ) -> None:
    path = available()[0].find()
    result = client.predict(photo=handle_file(str(path)), api_name="/classify")
    expected = dict(model.classify(str(path), top=len(model.labels)))
    assert result == pytest.approx(expected, abs=1e-5)
    assert next(iter(result)) == next(iter(expected))
    assert sum(result.values()) == pytest.approx(1.0, abs=1e-4)


def test_there_are_five_endpoints_whose_parameters_have_names_and_defaults(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert isinstance(endpoints, dict)
    assert endpoints["unnamed_endpoints"] == {}
    parameters = {
        name: {each["parameter_name"]: each.get("parameter_default") for each in endpoint["parameters"]}
        for name, endpoint in endpoints["named_endpoints"].items()
    }
    assert parameters == {
        "/classify": {"photo": None},
        "/settle": {"photo": None, "solver": "fixed point", "max_steps": 24, "tolerance": 0.01, "damping": 0.7},
        "/gradient": {"photo": None, "steps": 5, "damping": 0.7},
        "/nearby": {"photo": None, "change": "brightness", "percent": 5},
        "/about": {},
    }
    assert "raw.githubusercontent.com" not in json.dumps(endpoints)
    components = {each["component"] for each in endpoints["named_endpoints"]["/settle"]["parameters"]}
    assert components == {"Image", "Radio", "Number"}


def test_settle_tells_every_step(client: Client, model: MDEQ) -> None:
    photo = handle_file(str(available()[0].find()))
    own = client.predict(photo=photo, api_name="/settle")
    assert own["settled"]
    assert own["steps"] == len(own["residuals"]) == len(own["residuals_by_resolution"]) == len(own["labels"])
    assert own["residuals"][-1] <= 0.01
    assert (own["label"], pytest.approx(own["probability"], abs=1e-5)) == model.classify(available()[0].find(), top=1)[
        0
    ]
    short = client.predict(photo=photo, solver="Broyden", max_steps=2, api_name="/settle")
    assert not short["settled"]
    assert short["steps"] == 2


def test_gradient_nearby_and_about(client: Client, model: MDEQ) -> None:
    photo = handle_file(str(available()[0].find()))
    found = client.predict(photo=photo, steps=4, api_name="/gradient")
    assert found["exact"]["cosine"] == pytest.approx(1.0)
    assert found["Neumann phantom"]["products"] == 4 < found["exact"]["products"]
    started = client.predict(photo=photo, percent=2, api_name="/nearby")
    assert started["warm"]["steps"] < started["cold"]["steps"]
    about = client.predict(api_name="/about")
    assert about["classes"] == model.labels
    assert (about["solver"], about["max_steps"], about["tolerance"], about["damping"]) == ("fixed point", 24, 0.01, 0.7)


@pytest.mark.parametrize(
    ("endpoint", "values", "message"),
    [
        ("/settle", {"max_steps": 61}, "The most steps are a whole number from 1 to 60, not 61."),
        ("/settle", {"max_steps": 2.5}, "The most steps are a whole number from 1 to 60, not 2.5."),
        ("/settle", {"tolerance": 0}, "The tolerance is from 1e-05 to 1, not 0."),
        ("/settle", {"damping": 2}, "The damping is from 0.05 to 1, not 2."),
        ("/settle", {"max_steps": 10**400}, "The most steps are a whole number from 1 to 60, not 1000"),
        ("/settle", {"tolerance": 10**400}, "The tolerance is from 1e-05 to 1, not 1000"),
        ("/settle", {"solver": "newton"}, "The solver is one of fixed point, Anderson, Broyden, not 'newton'."),
        ("/settle", {"solver": ["<b>"]}, "The solver is one of fixed point, Anderson, Broyden, not ['&lt;b&gt;']."),
        ("/gradient", {"steps": 0}, "The steps are a whole number from 1 to 12, not 0."),
        ("/gradient", {"damping": 0}, "The damping is from 0.05 to 1, not 0."),
        ("/nearby", {"percent": 90}, "The change is by 0 to 30 percent, not 90."),
        ("/nearby", {"percent": 10**400}, "The change is by 0 to 30 percent, not 1000"),
        ("/nearby", {"change": "rotation"}, "The change is one of brightness, shift, crop, not 'rotation'."),
    ],
)
def test_values_out_of_range_are_refused_in_words(
    client: Client, endpoint: str, values: dict[str, object], message: str
) -> None:
    with pytest.raises(AppError, match=re.escape(message)):
        client.predict(photo=handle_file(str(available()[0].find())), **values, api_name=endpoint)


def test_answers_of_visitors_who_come_together_are_their_own(page: str, model: MDEQ, tmp_path: Path) -> None:
    photos = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(photos):
        Image.effect_noise((64, 64), 40 + 40 * number).convert("RGB").save(path)
    expected = [dict(model.classify(str(path), top=len(model.labels))) for path in photos]

    def ask(path: Path) -> list[dict[str, float]]:
        with closing(Client(page, verbose=False)) as visitor:
            return [visitor.predict(photo=handle_file(str(path)), api_name="/classify") for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for answers, own in zip(pool.map(ask, photos), expected, strict=True):
            assert answers == [pytest.approx(own, abs=1e-4)] * 3


def test_a_full_queue_is_told_and_empties(checkpoint: Path, tmp_path: Path) -> None:
    with serve(checkpoint, tmp_path / "page", seconds_per_step=0.1) as address:
        photo = Image.new("RGB", (8, 8))
        photo.save(tmp_path / "photo.png")
        client = Client(address, verbose=False)
        jobs = [client.submit(photo=handle_file(str(tmp_path / "photo.png")), api_name="/classify") for _ in range(24)]
        told = [job.exception(timeout=120) for job in jobs]
        client.close()
    full = [error for error in told if error is not None]
    assert 1 <= len(full) <= 8
    assert all("queue is full" in str(error).lower() for error in full)


def test_a_text_file_is_refused_in_words(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_text("just some text")
    with pytest.raises(AppError, match="not a photo in a known format"):
        client.predict(photo=handle_file(str(path)), api_name="/classify")


def test_no_photo_is_refused_in_words(client: Client) -> None:
    with pytest.raises(AppError, match="Send a photo"):
        client.predict(photo=None, api_name="/classify")


@pytest.mark.parametrize(
    "data",
    [
        [],
        ["photo.png"],
        [5],
        [[1, 2]],
        [{}],
        [{"path": 5, "meta": {"_type": "gradio.FileData"}}],
        [{"path": None, "meta": {"_type": "gradio.FileData"}}],
        [{"path": "photo.png"}],
        [{"url": "data:image/png;base64,iVBORw0KGgo=", "meta": {"_type": "gradio.FileData"}}],
        [{"path": "/nowhere/" + 300 * "x", "meta": {"_type": "gradio.FileData"}}],
        [{"path": "a\0b", "meta": {"_type": "gradio.FileData"}}],
    ],
)
def test_a_malformed_request_is_refused_in_words(page: str, data: list[object]) -> None:
    started = httpx.post(f"{page}gradio_api/call/classify", json={"data": data})
    told = httpx.get(f"{page}gradio_api/call/classify/{started.json()['event_id']}").text
    assert told.startswith("event: error")
    assert re.search("does not have the form that|must be an uploaded file|Send a photo", told)


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/photo.png", "/etc/passwd", str(available()[0].find())])
@pytest.mark.parametrize("extra", [{"meta": {"_type": "gradio.FileData"}}, {}], ids=["marked", "unmarked"])
def test_only_uploaded_files_are_read(page: str, path: str, extra: dict[str, object]) -> None:
    payload = {"path": path, **extra}
    started = httpx.post(f"{page}gradio_api/call/classify", json={"data": [payload]})
    told = httpx.get(f"{page}gradio_api/call/classify/{started.json()['event_id']}").text
    assert told.startswith("event: error")
    assert "passwd" not in told
    assert "127.0.0.1" not in told


@pytest.mark.parametrize("address", ["docs", "redoc", "openapi.json", "monitoring", "gradio_api/runs"])
def test_nothing_else_is_served(page: str, address: str) -> None:
    response = httpx.get(f"{page}{address}", follow_redirects=True)
    assert response.status_code in (403, 404)


def test_files_of_the_machine_are_not_served(page: str) -> None:
    for path in ("/etc/passwd", str(Path(__file__).resolve())):
        assert httpx.get(f"{page}gradio_api/file={path}").status_code in (403, 404)


def test_the_page_asks_for_nothing_elsewhere(page: str) -> None:
    config = httpx.get(f"{page}config").json()
    assert config["analytics_enabled"] is False
    assert config["stylesheets"] == []
    assert config["show_error"] is False
    assert "fonts.g" not in json.dumps(config)


def test_a_large_photo_is_answered(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (4000, 3000), (10, 120, 200)).save(path)
    assert len(client.predict(photo=handle_file(str(path)), api_name="/classify")) == 8


def test_a_file_above_the_limit_is_not_taken(page: str) -> None:
    response = httpx.post(f"{page}gradio_api/upload", files={"files": ("large.jpg", bytes(21 * 2**20), "image/jpeg")})
    assert response.status_code == 413
