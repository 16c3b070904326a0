"""Files are written to a temporary name and moved: what was there before survives a failure."""

import contextlib
import json
import os
import pathlib
import secrets
import shutil


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`; it becomes `path` if the block succeeds.

    Args:
        path: The file or folder to write; a link to one stays, and what it points to is replaced.
            Its folder is made.

    Yields:
        A `pathlib.Path` with the suffix of `path`; nothing stands there yet.
    """
    path = pathlib.Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by the number of the process, which in a container is that of one that was killed.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        _move(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _move(source, path):
    """Moves a file or folder onto `path`; a folder there is replaced by a folder only."""
    if not path.is_dir():
        os.replace(source, path)
        return
    if not source.is_dir():
        raise ValueError(f"{path} is a folder: a file cannot replace it. Choose another path.")
    old = source.with_name(source.name + ".old")
    os.replace(path, old)
    try:
        os.replace(source, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def write_text(path, text):
    """Writes `text` to the file `path` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Writes `value` to the file `path` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def shown(path):
    """A path as text that can be printed and written, also of a name that is no UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def check_new(path, overwrite, how="pass overwrite=True (--overwrite)"):
    """Raises ValueError if something stands at `path`, unless `overwrite`."""
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{path} exists already: {how}, or choose another path.")


def is_free(folder):
    """Whether nothing stands at a folder, or an empty one."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_replaceable(folder, marker, command, overwrite):
    """Raises ValueError if something stands at a folder, unless a command wrote it and `overwrite`.

    An empty folder is nothing, but a mount cannot be replaced.

    Args:
        folder: `pathlib.Path` of the folder to write.
        marker: The file in it by which what the command wrote is known.
        command: Its name.
        overwrite: Whether that may be replaced.
    """
    if os.path.ismount(folder.resolve()):
        raise ValueError(f"{folder} is a mount, which cannot be replaced: choose a folder in it.")
    if is_free(folder):
        return
    if overwrite and not (folder / marker).exists():
        raise ValueError(f"{folder} is not a folder that `{command}` wrote: choose another path.")
    check_new(folder, overwrite)
