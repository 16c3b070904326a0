"""Progress bars for long work, where a person may be waiting."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool

_PROGRESS_FROM = 500  # items; fewer are done before a progress bar is worth drawing


def progress(items: Iterable, description: str, total: int) -> Iterator:
    """Passes items on, with a progress bar on a terminal's stderr where there are many."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = total <= _PROGRESS_FROM or not console.is_terminal
    return track(items, description, total, console=console, disable=quiet)


def map_threads(function: Callable, items: list, description: str) -> list:
    """Applies a function to each item in threads, with a progress bar; results are in order."""
    with ThreadPool(min(32, 2 * (os.cpu_count() or 1))) as pool:
        results = pool.imap(function, items, chunksize=16)
        return list(progress(results, description, len(items)))
