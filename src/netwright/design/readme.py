"""``README.txt`` of a run folder: how to use the network without netwright and with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netwright.design.model import Architecture

FILES = {
    "model.onnx": "the network with its preprocessing, for ONNX Runtime and every other reader of ONNX",
    "architecture.json": "how the network is built: its cells, input shape, class names, mean and standard deviation",
    "model.safetensors": "its weights; with architecture.json they rebuild it in PyTorch",
    "model-dense.onnx": "the same network before pruning, and model-dense.safetensors",
    "baseline/": "the baseline it is compared with, in the same files",
    "classes.json": "names of the classes, in the order of the logits",
    "sample.npz": "a few test inputs (images) and their true classes (labels)",
    "report.html": "what was found; report.md and report.json hold the same figures",
    "run.json": "the command, every option, versions and machine; netwright design --config run.json replays it",
    "plan.json": "stages with their minutes and sizes, and what changed on the way",
    "data.json": "counts per class and part, and faults of the data",
    "search.json": "the architecture that was found, and how the search went",
    "training.json": "every epoch of every stage, of the network and of the baseline",
    "measurements.json": "accuracy, sizes and speed of the network and the baseline, before and after pruning",
    "mistakes.npz": "the most confident mistakes on the test examples",
    "maps.npz": "where the network's features are in test images it gets right and wrong",
    "radii.npz": "how far ten test images may change with the class certain, and how near counterexamples are",
}


def readme_text(architecture: Architecture) -> str:
    """``README.txt`` of a run: five lines for ONNX Runtime, five for PyTorch, and what each file is.

    Example:
        >>> from netwright.design.model import Architecture
        >>> text = readme_text(Architecture("named", (3, 32, 32), ("cat", "dog"), (0.5,), (0.2,), name="resnet18"))
        >>> "session.run" in text, "netwright.load" in text
        (True, True)
    """
    channels, height, width = architecture.shape
    if architecture.picture:
        kind = {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")
        given = f"{kind} images of any size (0 to 255, resized to {width} x {height})"
    else:
        given = f"arrays of shape {channels} x {height} x {width}"
    onnx = _indented(onnx_lines(architecture.picture))
    torch = _indented(_torch_lines(architecture.picture))
    width_of = max(map(len, FILES)) + 2
    files = "\n".join(f"  {name:{width_of}}{what}" for name, what in FILES.items())
    return (
        f"A network designed by netwright. It sorts {given} into {len(architecture.classes)} classes.\n"
        "This folder can be moved; run the lines below inside it.\n\n"
        f"With numpy and onnxruntime (pip install numpy onnxruntime):\n\n{onnx}\n\n"
        f"With PyTorch (pip install netwright):\n\n{torch}\n\n"
        f"Files (some appear only when their stage is done):\n\n{files}\n"
    )


def onnx_lines(picture: bool) -> str:
    """Five lines of Python that need numpy and onnxruntime only, to be run inside the folder."""
    layout = "uint8, [batch, height, width, channels]" if picture else "float32, [batch, channels, height, width]"
    return (
        "import json, numpy as np, onnxruntime\n"
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
        f'images = np.load("sample.npz")["images"]  # {layout}\n'
        'logits = session.run(["logits"], {"image": images})[0]\n'
        'print(np.array(json.load(open("classes.json", encoding="utf-8")))[logits.argmax(1)])'
    )


def _torch_lines(picture: bool) -> str:
    order = ".permute(0, 3, 1, 2)  # uint8, [batch, channels, height, width]" if picture else ""
    return (
        "import netwright, torch\n"
        "import numpy as np\n"
        'model = netwright.load(".")\n'
        f'images = torch.from_numpy(np.load("sample.npz")["images"]){order}\n'
        "print(model.predict(images))"
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
