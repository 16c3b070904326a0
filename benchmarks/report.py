"""Writes the tables and pictures of the results into the READMEs, as each benchmark does.

    python benchmarks/report.py

Each `benchmarks/results/NAME.json` belongs to `benchmarks/NAME.py`, whose `table` and `plot` make a
table and a picture of it. Between `<!-- begin NAME -->` and `<!-- end NAME -->` nothing is typed.
"""

import importlib
import json
import pathlib
import re

from keras_vit.files import replacing, write_text

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLAIMS = "how fast"  # the part of the README of the project


def section(result):
    """The Markdown of a result."""
    return importlib.import_module(result["benchmark"]).table(result)


def picture(result, path):
    """Draws a result, if its benchmark has a picture; returns whether it has."""
    module = importlib.import_module(result["benchmark"])
    if hasattr(module, "plot"):
        with replacing(path) as temporary:
            module.plot(result, temporary)
    return hasattr(module, "plot")


def load(name):
    """The result of a benchmark, or None if it has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def part(name, folder):
    """What stands between the markers of a name, in a README of a folder."""
    benchmark = "speed" if name == CLAIMS else name
    result = load(benchmark)
    if result is None:
        return "Not measured yet.\n"
    module = importlib.import_module(benchmark)
    text = module.claims(result) if name == CLAIMS else module.table(result)
    if hasattr(module, "plot"):
        place = (RESULTS / f"{benchmark}.png").relative_to(folder).as_posix()
        text += f"\n![{benchmark}]({place})\n"
    return text


def filled(text, folder):
    """A README with each of its parts made anew."""
    pattern = r"(<!-- begin (.+?) -->\n).*?(<!-- end \2 -->)"
    return re.sub(
        pattern,
        lambda found: found[1] + "\n" + part(found[2], folder) + "\n" + found[3],
        text,
        flags=re.DOTALL,
    )


def write_readmes():
    """Brings the READMEs up to date."""
    for folder in (ROOT, ROOT / "benchmarks"):
        readme = folder / "README.md"
        write_text(readme, filled(readme.read_text(encoding="utf-8"), folder))
        print(f"{readme} is up to date.")


def main():
    for path in RESULTS.glob("*.json"):
        picture(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
    write_readmes()


if __name__ == "__main__":
    main()
