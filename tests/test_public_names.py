import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_basin
import lightning_basin.functional
from lightning_basin import Probe
from lightning_basin.measurement import check_measurable

PACKAGES = ["lightning_basin", "lightning_basin.functional"]
PUBLIC = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


def in_order(names):
    """Constants, then classes, then functions, each by the alphabet: the order in which ruff sorts."""
    kinds = [(not name.isupper(), name[0].islower(), name) for name in names]
    return [name for _, _, name in sorted(kinds)]


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_names_nothing_twice(package):
    names = importlib.import_module(package).__all__
    assert list(names) == in_order(set(names))


@pytest.mark.parametrize("package", PACKAGES)
def test_all_names_everything_that_the_package_imports(package):
    namespace = vars(importlib.import_module(package))
    imported = {name for name, value in namespace.items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert imported == set(namespace["__all__"])


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_every_public_name_can_be_imported(package, name):
    assert hasattr(importlib.import_module(package), name)


@pytest.mark.parametrize(
    ("package", "name"), [(p, n) for p, n in PUBLIC if callable(getattr(importlib.import_module(p), n))]
)
def test_every_public_class_and_function_has_a_docstring_of_its_own(package, name):
    item = getattr(importlib.import_module(package), name)
    documentation = inspect.getdoc(item)
    assert documentation
    assert not documentation.startswith(f"{name}(")  # What a dataclass writes where there is none.


@pytest.mark.parametrize(
    ("package", "name"), [(p, n) for p, n in PUBLIC if inspect.isclass(getattr(importlib.import_module(p), n))]
)
def test_every_public_method_has_a_docstring(package, name):
    item = getattr(importlib.import_module(package), name)
    methods = {
        own: value for own, value in vars(item).items() if callable(getattr(value, "__func__", value)) and own[0] != "_"
    }
    assert [own for own in methods if not inspect.getdoc(getattr(item, own))] == []


def test_what_functional_exports_is_what_the_library_runs():
    """No name is there for tests alone: each is used in another file than its own."""
    root = Path(lightning_basin.__file__).parent
    listed = {root / "functional" / name for name in ("__init__.py", "sketch.py")}
    sources = [path.read_text(encoding="utf-8") for path in root.rglob("*.py") if path not in listed]
    for name in lightning_basin.functional.__all__:
        is_definition = re.compile(rf"^(def|class) {name}\b|^{name} =", re.MULTILINE)
        assert any(re.search(rf"\b{name}\b", text) for text in sources if not is_definition.search(text)), name


def test_every_module_has_a_docstring():
    names = [
        "lightning_basin",
        *(module.name for module in pkgutil.walk_packages(lightning_basin.__path__, "lightning_basin.")),
    ]
    assert [name for name in names if not importlib.import_module(name).__doc__] == []


@pytest.mark.parametrize("module", ["measurement", "monitor", "functional.sketch"])
def test_names_of_earlier_versions_are_those_of_today(module):
    earlier = importlib.import_module(f"lightning_basin.{module}")
    for name in set(earlier.__all__) - {"check_measurable", "LayerGradients"}:
        item = getattr(earlier, name)
        assert item is getattr(importlib.import_module(item.__module__), name)


def test_the_earlier_check_takes_settings_as_keywords():
    plan = check_measurable(nn.Linear(3, 2), Probe(torch.eye(3)), num_inputs=5, dtype="float32")
    assert (plan.num_inputs, plan.num_outputs, plan.num_parameters) == (5, 2, 8)
