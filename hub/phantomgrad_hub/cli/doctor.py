"""`phantomgrad doctor`: what is installed here, and does it work?"""

from __future__ import annotations

import argparse
import platform
import warnings
from importlib import metadata
from typing import Any

import torch

import phantomgrad

from .common import add_command, print_json

EXTRAS = {
    "hub": ("huggingface_hub", "safetensors", "pillow"),
    "train": ("accelerate", "datasets", "tensorboard", "timm", "torchvision", "tqdm"),
    "demo": ("gradio", "scikit-image", "scikit-learn"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "doctor",
        summary="Show versions, devices and extras, and check that solving and differentiating work here.",
        example="phantomgrad doctor",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the findings; exit status 1 where a check fails."""
    checks = {"fixed point": _check_solve(), "gradient": _check_gradient(), "embedded checkpoint": _check_embedded()}
    packages = {name: _version(name) for names in EXTRAS.values() for name in names}
    devices = ["cpu", *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))]
    if options.json:
        report = {
            "phantomgrad": phantomgrad.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        print_json({**report, "devices": devices, "packages": packages, "checks": checks})
        return 0 if all(result == "ok" for result in checks.values()) else 1
    rows = [
        ("phantomgrad", phantomgrad.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    rows += [("devices", ", ".join(devices)), ("threads", str(torch.get_num_threads()))]
    for extra, names in EXTRAS.items():
        missing = any(packages[name] is None for name in names)
        versions = ", ".join(f"{name} {packages[name] or 'missing'}" for name in names)
        rows.append((f"[{extra}]", f"{versions}  (pip install 'phantomgrad[{extra}]')" if missing else versions))
    rows += [(f"check: {name}", result) for name, result in checks.items()]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    return 0 if all(result == "ok" for result in checks.values()) else 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _solved(a: torch.Tensor) -> torch.Tensor:
    """The fixed point 2 of `x = a x + 1` for `a` = 1/2."""
    solver = phantomgrad.FixedPointIteration(max_steps=100)
    gradient = phantomgrad.UnrolledPhantom(steps=10, damping=0.5)
    start = torch.zeros(1, 1, dtype=torch.float64)
    solution = phantomgrad.fixed_point(lambda x, a: a * x + 1, start, a, gradient=gradient, solver=solver)
    value = solution.value
    assert isinstance(value, torch.Tensor)
    return value


def _check_solve() -> str:
    found = float(_solved(torch.tensor(0.5, dtype=torch.float64)))
    return "ok" if abs(found - 2) < 1e-6 else f"failed: the fixed point of x/2 + 1 came out as {found}"


def _check_gradient() -> str:
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    _solved(a).square().sum().backward()
    # d(x*^2)/da = 2 x* x* / (1 - a) = 16, of which ten steps of damping 1/2 give 1 - (3/4)^10
    expected = 16 * (1 - 0.75**10)
    found = float("nan") if a.grad is None else float(a.grad)
    return "ok" if abs(found - expected) < 1e-3 else f"failed: a gradient of {expected:.4f} came out as {found:.4f}"


def _check_embedded() -> str:
    from phantomgrad_hub.models.mdeq import MDEQ

    try:
        model = MDEQ.from_pretrained("embedded")
        with torch.inference_mode(), warnings.catch_warnings():
            # A blank image need not settle.
            warnings.simplefilter("ignore", phantomgrad.NotConvergedWarning)
            finite = bool(torch.isfinite(model(torch.zeros(1, 3, *[model.config.image_size] * 2))).all())
    except (phantomgrad.PhantomGradError, OSError) as error:
        return f"failed: {error}"
    return "ok" if finite else "failed: its output is not finite"
