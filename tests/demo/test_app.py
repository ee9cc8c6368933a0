"""The page's API from a program, and what the server gives away."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="needs the extra `demo`")

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


def test_classify_is_the_only_endpoint(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert isinstance(endpoints, dict)
    assert list(endpoints["named_endpoints"]) == ["/classify"]
    assert endpoints["unnamed_endpoints"] == {}
    [parameter] = endpoints["named_endpoints"]["/classify"]["parameters"]
    assert parameter["parameter_name"] == "photo"


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
