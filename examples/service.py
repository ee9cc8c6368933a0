"""A web service of an exported classifier: onnxruntime, numpy, Pillow and the standard library, no torch, no phantomgrad.

phantomgrad export embedded --out model.onnx
python examples/service.py model.onnx
curl --data-binary @photo.jpg http://127.0.0.1:8000
"""

import argparse
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MOST_BYTES = 20_000_000


class Classifier:
    """Classify photos by a `.onnx` file and the `.json` beside it."""

    def __init__(self, file: str) -> None:
        about = json.loads(Path(file).with_suffix(".json").read_text(encoding="utf-8"))
        self.names, self.how = [label["name"] for label in about["labels"]], about["preprocessing"]
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def preprocess(self, photo: bytes) -> np.ndarray:
        """The file of a photo as `(1, 3, size, size)`: its middle at the model's size, normalised."""
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(photo))).convert("RGB")
        size, sides = self.how["size"], image.size
        shorter = self.how["resize"] or size
        resized = [shorter if side == min(sides) else int(shorter * side / min(sides)) for side in sides]
        resized = resized if self.how["fit"] == "crop" else [size, size]
        step = [side / length for side, length in zip(sides, resized, strict=True)]
        start = [round((length - size) / 2) for length in resized]
        ends = [min((first + size) * each, side) for first, each, side in zip(start, step, sides, strict=True)]
        box = (start[0] * step[0], start[1] * step[1], *ends)
        image = image.resize((size, size), Image.Resampling[self.how["interpolation"].upper()], box=box)
        pixels = (np.asarray(image, np.float32) / 255 - np.float32(self.how["mean"])) / np.float32(self.how["std"])
        return pixels.transpose(2, 0, 1)[None]

    def __call__(self, photo: bytes, top: int = 5) -> list[tuple[str, float]]:
        """The best classes with their probabilities."""
        [logits] = self.session.run(["logits"], {"images": self.preprocess(photo)})[0]
        odds = np.exp(logits - logits.max())
        return [(self.names[i], float(odds[i] / odds.sum())) for i in np.argsort(-logits)[:top]]


def server(classifier: Classifier, port: int) -> ThreadingHTTPServer:
    """A server that answers the photo of a POST request with its classes as JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                length = max(0, int(self.headers.get("Content-Length", 0)))
                status, answer = 200, dict(classifier(self.rfile.read(min(length, MOST_BYTES))))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                status, answer = 400, {"error": str(error)}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", help="the .onnx file")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    server(Classifier(options.file), options.port).serve_forever()
