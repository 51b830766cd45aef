"""Rewrites what the documentation takes from the code: the methods table and the recipe schema.

python scripts/update_docs.py            writes README.md and docs/recipe.schema.json
python scripts/update_docs.py --check    exits with 1 when either is out of date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from streammerge.methods import discover_methods
from streammerge.methods.describing import render_methods_table
from streammerge.recipe.json_schema import recipe_json_schema

ROOT = Path(__file__).resolve().parent.parent
_TABLE = re.compile(r"(<!-- methods: begin[^\n]*-->\n).*?(<!-- methods: end -->)", re.DOTALL)


def render_documents() -> dict[Path, str]:
    """Return the text that each generated document should have."""
    methods = discover_methods()
    table = render_methods_table(methods.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    specs = {name: method.parameters for name, method in methods.items()}
    schema = json.dumps(recipe_json_schema(specs), indent=2, ensure_ascii=False)
    return {
        ROOT / "README.md": _TABLE.sub(lambda found: f"{found[1]}{table}\n{found[2]}", readme),
        ROOT / "docs" / "recipe.schema.json": schema + "\n",
    }


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
