import importlib
import inspect
import pkgutil

import pytest

import lightning_basin
import lightning_basin.functional

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


def test_every_module_has_a_docstring():
    names = [
        "lightning_basin",
        *(module.name for module in pkgutil.walk_packages(lightning_basin.__path__, "lightning_basin.")),
    ]
    assert [name for name in names if not importlib.import_module(name).__doc__] == []
