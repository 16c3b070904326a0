"""What is installed: `keras_vit` with `keras_vit.export`, and no other top-level name."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
IMPORT = """
import pathlib, sys
import keras_vit, keras_vit.export, keras_vit.training, keras_vit.data, keras_vit.cli
for module in (keras_vit, keras_vit.export):
    print(pathlib.Path(module.__file__).resolve())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # The sources are copied: a build writes beside them.
    names = ["keras_vit", "export", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "tests"]
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / "source").mkdir(exist_ok=True)
        copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    return path


def test_wheel_has_no_other_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"keras_vit"}
    assert "keras_vit/export/tflite.py" in names
    assert any(name.endswith("licenses/LICENSE") or name.endswith("LICENSE") for name in names)


def test_wheel_imports_from_outside_the_repository(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    out = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [pathlib.Path(line) for line in out.splitlines()]
    assert paths == [
        target.resolve() / "keras_vit" / "__init__.py",
        target.resolve() / "keras_vit" / "export" / "__init__.py",
    ]


def test_checkout_imports_without_being_installed():
    """As for someone who installed the wheel and runs Python in the clone, which shadows it."""
    uninstall = "import sys\nsys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]"
    out = subprocess.run(
        [sys.executable, "-c", uninstall + IMPORT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.splitlines() == [
        str(ROOT / "keras_vit" / "__init__.py"),
        str(ROOT / "export" / "__init__.py"),
    ]


def test_every_module_is_in_the_wheel(wheel):
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "keras_vit").rglob("*.py")}
    export = {f"keras_vit/export/{path.name}" for path in (ROOT / "export").glob("*.py")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == library | export


def test_editable_install_imports_from_the_root_and_outside(tmp_path):
    for folder in (ROOT, tmp_path):
        out = subprocess.run(
            [sys.executable, "-c", IMPORT], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
        assert out.splitlines() == [
            str(ROOT / "keras_vit" / "__init__.py"),
            str(ROOT / "export" / "__init__.py"),
        ]
