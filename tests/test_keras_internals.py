"""What is used beyond public interfaces: it is there, listed, and in one place."""

import ast
import importlib
import pathlib

import keras
import pytest
import tensorflow as tf

from keras_vit.training import distributed, keras_internals

PACKAGE = pathlib.Path(keras_internals.__file__).parents[1]
SOURCES = [pathlib.Path(module.__file__) for module in (keras_internals, distributed)]


def listed(table):
    return [(owner, name) for owner, names in table.items() for name in names]


def resolve(path):
    """A module, or a class in one, by its dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def missing(name, owner):
    package = tf if owner.startswith("tensorflow.") else keras
    return (
        f"{package.__name__} {package.__version__} has no `{name}` in {owner} any more: "
        "keras_vit/training/keras_internals.py has to do without it."
    )


@pytest.mark.parametrize(("owner", "name"), listed(keras_internals.ATTRIBUTES))
def test_attribute_is_there(owner, name):
    assert hasattr(resolve(owner), name), missing(name, owner)


@pytest.fixture(scope="module")
def instances():
    """Objects of stock Keras by their words in INSTANCE_ATTRIBUTES."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.5)])
    model.compile(keras.optimizers.SGD(use_ema=True), "mse")
    trainer = importlib.import_module("keras.src.backend.tensorflow.trainer")
    iterator = trainer.TFEpochIterator(
        distribute_strategy=tf.distribute.get_strategy(), x=tf.zeros((4, 3)), batch_size=2
    )
    model.optimizer.build(model.trainable_variables)
    return {
        "model": model,
        "compile_loss": model._compile_loss,
        "layer": model.layers[-1],
        "optimizer": model.optimizer,
        "epoch_iterator": iterator,
    }


@pytest.mark.parametrize(("owner", "name"), listed(keras_internals.INSTANCE_ATTRIBUTES))
def test_attribute_of_an_instance_is_there(instances, owner, name):
    assert hasattr(instances[owner], name), missing(name, f"a {type(instances[owner]).__name__}")


def private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(tree):
    """The private functions, methods and class attributes that a module defines."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.Assign):
                    names |= {target.id for target in line.targets}
    return set(filter(private, names))


def test_no_other_attribute_is_used():
    """Each `x._name` of the two modules is their own or in the tables, and the reverse."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    used = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and private(node.attr)
    }
    own = set().union(*map(own_names, trees))
    tables = (keras_internals.ATTRIBUTES, keras_internals.INSTANCE_ATTRIBUTES)
    names = {name for table in tables for _, name in listed(table) if private(name)}
    assert used - own <= names, "private attributes that no table lists"
    assert names <= used | own, "attributes that are listed and not used"


def test_only_one_module_imports_from_within_keras_and_tensorflow():
    """And what it imports is in the tables."""
    within = ("keras.src", "tensorflow.python")
    imported = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(within):
                imported[node.module] = {alias.name for alias in node.names}
                assert path == SOURCES[0], f"{path} imports {node.module}"
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith(within) for alias in node.names), path
    assert imported
    for module, names in imported.items():
        assert names <= set(keras_internals.ATTRIBUTES[module])


def test_steps_are_overridden_where_keras_has_them():
    """An override of a method that Keras no longer calls would do nothing, in silence."""
    overridden = own_names(ast.parse(SOURCES[0].read_text())) & set(dir(keras.Model))
    assert overridden == {"_maybe_symbolic_build", "_make_function"}
