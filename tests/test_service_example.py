"""The example of a service answers as the model does, without torch and without this package."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_examples import EXAMPLES, load

from phantomgrad import FixedPointIteration
from phantomgrad_hub import MDEQ, MDEQConfig, Preprocessing
from phantomgrad_hub.export import export

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)
pytestmark = pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")


@pytest.fixture(scope="module")
def model() -> MDEQ:
    """A small model whose own solver takes exactly as many steps as its export."""
    torch.manual_seed(0)
    config = MDEQConfig(
        channels=(8, 8),
        num_classes=7,
        image_size=24,
        groups=4,
        expansion=1,
        blocks=1,
        head="pooled",
        solver=FixedPointIteration(damping=0.7, max_steps=3, rtol=0.0, atol=0.0, keep="last"),
    )
    return MDEQ(config, preprocessing=Preprocessing(size=24, resize=28, interpolation="bicubic")).eval()


@pytest.fixture(scope="module")
def file(model: MDEQ, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("service") / "model.onnx"
    export(model, path)
    return path


def photo(width: int, height: int, mode: str = "RGB", orientation: int = 1) -> bytes:
    """A photo without symmetry, as a file's bytes."""
    noise = Image.effect_noise((max(width // 8, 2), max(height // 8, 2)), 90).resize((width, height))
    gradient = Image.linear_gradient("L").resize((width, height))
    image = Image.merge("RGB", (noise, gradient, gradient.transpose(Image.Transpose.ROTATE_180))).convert(mode)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


PHOTOS = [
    photo(60, 40),
    photo(41, 97),
    photo(24, 24),
    photo(500, 333),
    photo(64, 48, "L"),
    photo(90, 50, orientation=6),
]


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(size=24),
        Preprocessing(size=24, resize=31, interpolation="lanczos", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)),
        Preprocessing(size=24, fit="squash", interpolation="box"),
    ],
)
def test_preprocessing_is_the_models(preprocessing: Preprocessing, file: Path) -> None:
    classifier = load("service").Classifier(str(file))
    classifier.how = json.loads(json.dumps(preprocessing.to_dict()))
    for each in PHOTOS:
        found = torch.from_numpy(classifier.preprocess(each).copy())
        torch.testing.assert_close(found, preprocessing(each), rtol=0, atol=1e-5)


def test_answers_are_those_of_classify(model: MDEQ, file: Path) -> None:
    classifier = load("service").Classifier(str(file))
    for each in PHOTOS:
        names, probabilities = zip(*classifier(each), strict=True)
        own_names, own_probabilities = zip(*model.classify(each), strict=True)
        assert names == own_names
        assert probabilities == pytest.approx(own_probabilities, abs=1e-5)


def test_server_answers_photos_and_refuses_the_rest(model: MDEQ, file: Path) -> None:
    service = load("service")
    with service.server(service.Classifier(str(file)), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            with urllib.request.urlopen(address, data=PHOTOS[0], timeout=30) as answer:
                found = json.load(answer)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(address, data=b"no photo", timeout=30)
            with refused.value as answer:
                assert answer.status == 400
                assert "cannot identify image file" in json.load(answer)["error"]
        finally:
            server.shutdown()
            thread.join()
    assert found == pytest.approx(dict(model.classify(PHOTOS[0])), abs=1e-5)


def test_needs_neither_torch_nor_this_package(model: MDEQ, file: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(PHOTOS[0])
    program = f"""
import json, pathlib, runpy, sys
sys.modules.update(dict.fromkeys(("torch", "phantomgrad", "phantomgrad_hub")))
Classifier = runpy.run_path({str(EXAMPLES / "service.py")!r})["Classifier"]
print(json.dumps(dict(Classifier({str(file)!r})(pathlib.Path("photo.jpg").read_bytes()))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(dict(model.classify(PHOTOS[0])), abs=1e-5)
    assert (EXAMPLES / "service.py").read_text(encoding="utf-8").count("\n") < 80
