"""Rewrites what the documentation takes from elsewhere.

The README's table of methods and the recipe schema come from the registry, its tables of performance
from the newest results of the benchmarks.

python scripts/update_docs.py            writes README.md and docs/recipe.schema.json
python scripts/update_docs.py --check    exits with 1 when either is out of date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.reporting import (  # noqa: E402 - found through ROOT
    render_baking_table,
    render_performance_table,
)
from streammerge.adapters.combining.recipes import every_method  # noqa: E402
from streammerge.methods import discover_methods  # noqa: E402
from streammerge.methods.describing import render_methods_table  # noqa: E402
from streammerge.recipe.json_schema import recipe_json_schema  # noqa: E402

MEASURED = {
    "performance": ("1.1B-2src-*.json", render_performance_table),
    "baking": ("baking-1.1B-*.json", render_baking_table),
}
"""Tables of the README: which results they come from, and how they are written."""


def render_documents() -> dict[Path, str]:
    """Return the text that each generated document should have."""
    methods = discover_methods()
    table = render_methods_table(methods.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = _between("methods", table, readme)
    for name, (pattern, render) in MEASURED.items():
        places = (ROOT / "benchmarks/results").glob(pattern)
        measured = [json.loads(path.read_text()) for path in places]
        if measured:
            newest = max(measured, key=lambda results: results["date"])
            readme = _between(name, render(newest), readme)
    specs = {name: method.parameters for name, method in methods.items()}
    semantics = {name: method.semantics for name, method in methods.items()}
    schema = json.dumps(
        recipe_json_schema(every_method(specs), semantics), indent=2, ensure_ascii=False
    )
    return {
        ROOT / "README.md": readme,
        ROOT / "docs" / "recipe.schema.json": schema + "\n",
    }


def _between(name: str, text: str, document: str) -> str:
    """Put ``text`` between the two comments that mark a generated part of a document."""
    marked = re.compile(rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", document)


def main() -> int:
    """Write or check the documents."""
    stale = []
    for path, text in render_documents().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.relative_to(ROOT))
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'out of date' if '--check' in sys.argv else 'written'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
