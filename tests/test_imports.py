"""What importing netwright does: next to nothing, and nothing to anybody else."""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import netwright

HEAVY = [
    "torch",
    "torchvision",
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "timm",
    "numpy",
    "scipy",
    "sklearn",
]
HEAVY += [
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "rich",
    "typer",
    "jinja2",
    "pydantic",
    "joblib",
]
HEAVY += ["networkx", "PIL", "ray", "safetensors", "filelock"]
TRAINERS = ["lightning", "pytorch_lightning", "lightning_fabric"]
# What inference and reading need; `nn` and `data` are checked with every module inside them.
LIGHT = [
    "nn",
    "data",
    "deploy",
    "cost",
    "papers.index",
    "metrics",
    "results",
    "page",
    "design.doctor",
    "design.model",
]


def run(code, *options, timeout=120):
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done


def modules_below(name):
    specification = importlib.util.find_spec(name)
    if specification is None:
        return []
    below = [name]
    if specification.submodule_search_locations:
        for entry in pkgutil.iter_modules(specification.submodule_search_locations):
            below += modules_below(f"{name}.{entry.name}")
    return below


def test_importing_netwright_loads_nothing_heavy():
    code = f"import sys, netwright; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code).stdout == "[]\n"


def test_importing_the_command_line_loads_no_numerics():
    if importlib.util.find_spec("netwright.cli") is None:
        pytest.skip("netwright.cli does not exist yet")
    heavy = [m for m in HEAVY if m not in {"rich", "typer"}]
    code = f"import sys, netwright.cli; print([m for m in {heavy} if m in sys.modules])"
    assert run(code).stdout == "[]\n"


def test_light_modules_do_not_load_the_trainer():
    names = [m for light in LIGHT if find(light) for m in modules_below(f"netwright.{light}")]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    loaded = [m for m in {TRAINERS} if m in sys.modules]
    if loaded:
        print(name, loaded)
        break
"""
    assert run(code).stdout == ""


def test_no_module_hides_a_name_that_its_package_exports_lazily():
    """Importing ``train/fit.py`` would make ``netwright.train.fit`` the module, and no longer the function."""
    hidden = []
    for name in modules_below("netwright"):
        places = importlib.util.find_spec(name).submodule_search_locations
        if places:
            inside = {entry.name for entry in pkgutil.iter_modules(places)}
            exported = set(getattr(importlib.import_module(name), "_NAMES", ()))
            hidden += [f"{name}.{shared}" for shared in sorted(exported & inside)]
    assert hidden == []
    code = "import netwright.train.fitting, netwright.train; from netwright.train import fit; print(fit.__qualname__)"
    assert run(code).stdout == "fit\n"


def find(name):
    try:
        return importlib.util.find_spec(f"netwright.{name}")
    except ModuleNotFoundError:
        return None


def test_importing_everything_warns_of_nothing_and_changes_nobody():
    """Every module, warnings of ours as errors, and the outside world compared before and after."""
    names = [m for m in modules_below("netwright") if not m.endswith("__main__")]
    code = f"""
import importlib, os, random, signal, sys, types, warnings
import torch, torch.nn.functional, torch.onnx, torchvision, numpy, matplotlib
try:
    import lightning.pytorch
except ImportError:
    pass

HOMES = [torch, torch.nn, torch.nn.functional, torch.nn.Module, torch.Tensor, torch.optim, torch.onnx]
HOMES += [torchvision, numpy]

def world():
    seen = {{}}
    for home in HOMES:
        for name, value in vars(home).items():
            if not isinstance(value, types.ModuleType) and not name.startswith("__"):
                seen[f"{{home.__name__}}.{{name}}"] = id(value)
    return seen | {{
        "folder": os.getcwd(),
        "environment": hash(frozenset(os.environ.items())),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "generator": torch.initial_seed(),
        "random": hash(random.getstate()),
        "numpy": hash(numpy.random.get_state()[1].tobytes()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "backend": matplotlib.get_backend(auto_select=False),
        "style": hash(str(matplotlib.rcParams)),
        "interrupt": signal.getsignal(signal.SIGINT),
        "hook": sys.excepthook,
    }}

before = world()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in {names}:
        importlib.import_module(name)
after = world()
for w in caught:
    if "netwright" in w.filename:
        print("warning:", w.filename, w.lineno, w.message)
for key in sorted(before.keys() | after.keys()):
    if before.get(key) != after.get(key):
        print("changed:", key)
"""
    done = run(code)
    assert done.stdout == ""


def test_importing_netwright_under_warnings_as_errors():
    assert run("import netwright", "-W", "error").stderr == ""


def test_public_names_resolve_or_say_so():
    assert set(netwright.__all__) <= set(dir(netwright))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = netwright.nothing
    for name in netwright._PACKAGES:
        if find(name) is not None:
            assert getattr(netwright, name).__name__ == f"netwright.{name}"
    for name, home in netwright._NAMES.items():
        if find(home.removeprefix("netwright.")) is not None:
            assert callable(getattr(netwright, name))


@pytest.mark.parametrize("package", ["nn", "data", "train", "train.early_learning", "train.natural_transform"])
def test_every_public_name_of_a_package_resolves(package):
    module = importlib.import_module(f"netwright.{package}")
    assert [name for name in module.__all__ if getattr(module, name, None) is None] == []
    assert set(module.__all__) <= set(dir(module))
    assert len(set(module.__all__)) == len(module.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


def test_layers_and_loaders_by_the_names_that_people_type():
    from netwright.data import class_incremental_stream, colored_mnist, debian_graph, load_planetoid, textured_images
    from netwright.nn import DAGNN, LSSL, KeyValueBottleneck, hippo, lssl
    from netwright.train.debias import corrupted_images
    from netwright.train.early_learning import ELRPlus, MemorizationTracker

    assert lssl.LSSL is LSSL
    named = (
        DAGNN, KeyValueBottleneck, hippo, class_incremental_stream, colored_mnist, debian_graph, load_planetoid,
        textured_images, corrupted_images, ELRPlus, MemorizationTracker,
    )  # fmt: skip
    assert all(each.__doc__ for each in named)


def test_the_marker_of_typed_packages_is_shipped():
    assert (files("netwright") / "py.typed").is_file()


def test_every_folder_is_a_package():
    root = Path(netwright.__file__).parent
    bare = [str(f.relative_to(root)) for f in root.rglob("*") if f.is_dir() and any(f.glob("*.py"))]
    assert [f for f in bare if not (root / f / "__init__.py").exists()] == []
