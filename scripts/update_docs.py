"""Rewrites what the documentation takes from elsewhere.

Tables of methods and the recipe schema come from the registry, tables of performance from the newest
results of the benchmarks, reference pages from the code (:mod:`reference`). Generated parts stand between
two comments that name them, in any document.

python scripts/update_docs.py            writes the documents and docs/recipe.schema.json
python scripts/update_docs.py --check    exits with 1 when one is out of date
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import reference  # noqa: E402 - found beside this file

from benchmarks.reporting import (  # noqa: E402 - found through ROOT
    render_baking_table,
    render_measures,
    render_performance_table,
)
from benchmarks.roofline import render_roofline  # noqa: E402 - found through ROOT
from streammerge.adapters.combining.recipes import every_method  # noqa: E402
from streammerge.methods import discover_methods  # noqa: E402
from streammerge.methods.describing import render_methods_table  # noqa: E402
from streammerge.recipe.json_schema import recipe_json_schema  # noqa: E402

MEASURED = {
    "performance": ("1.1B-2src-*.json", render_performance_table),
    "roofline": ("1.1B-2src-*.json", partial(render_roofline, markdown=True)),
    "baking": ("baking-1.1B-*.json", render_baking_table),
}
"""Tables of performance: which results they come from, and how they are written."""
COMPARED = (
    ("`ties` of two models of 1.1B", "performance", "ties", ("streammerge", "mergekit", None)),
    ("an adapter into 1.1B", "baking", "1 adapter", ("streammerge", None, "peft")),
)
"""Rows of README's comparison that are measured: what, by which results, job, and contenders."""
ALTERNATIVES = (
    ("memory", "what `--memory` says, stated before it starts", "not bounded", "whole models"),
    (
        "random masks depend on",
        "seed, source, name, place",
        "device and order",
        "torch's generator",
    ),
    ("thresholds over", "tensors, or the whole model", "tensors", "tensors"),
    ("killed, full disk, power cut", "`--resume`", "starts again", "starts again"),
    ("what will happen", "`plan`: bytes, memory, refusals", "", ""),
    ("is it still what was written", "`verify`", "", ""),
    ("adapters beside full models, in any method", "yes", "merged into copies first", "no"),
    ("several machines; S3, the hub, HTTPS", "yes", "the hub, by copies", "the hub, by copies"),
)
"""Rows of README's comparison in words: streammerge, mergekit, PEFT."""
MANIFEST = (
    ("The file", "checkpoint/manifest.py", "Manifest"),
    ("tensors", "checkpoint/manifest.py", "TensorRecord"),
    ("run", "checkpoint/manifest.py", "RunRecord"),
    ("inputs", "checkpoint/types.py", "ShardFile"),
    ("notes", "checkpoint/types.py", "Note"),
)
"""The records of a manifest: their headings, and where their fields stand."""


def render_documents() -> dict[Path, str]:
    """Return the text that each generated document should have."""
    methods = discover_methods()
    specs = {name: method.parameters for name, method in methods.items()}
    semantics = {name: method.semantics for name, method in methods.items()}
    schema = recipe_json_schema(every_method(specs), semantics)
    events = json.loads((ROOT / "docs/reference/events.schema.json").read_text(encoding="utf-8"))
    parts = {
        "methods": render_methods_table(methods.values()),
        "commands": reference.render_commands(),
        "keys": reference.render_recipe_keys(schema),
        "every method": reference.render_methods(methods.values()),
        "events": reference.render_events(events),
        "manifest": reference.render_fields(MANIFEST),
        **_measured(),
    }
    documents = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        document = path.read_text(encoding="utf-8")
        for name, text in parts.items():
            document = _between(name, text, document)
        documents[path] = document
    text = json.dumps(schema, indent=2, ensure_ascii=False)
    return {**documents, ROOT / "docs" / "recipe.schema.json": text + "\n"}


def _measured() -> dict[str, str]:
    """Return the tables of performance, and README's comparison with others."""
    newest = {}
    for name, (pattern, _) in MEASURED.items():
        places = (ROOT / "benchmarks/results").glob(pattern)
        measured = [json.loads(path.read_text()) for path in places]
        if measured:
            newest[name] = max(measured, key=lambda results: results["date"])
    parts = {name: MEASURED[name][1](results) for name, results in newest.items()}
    if len(newest) < len(MEASURED):
        return parts
    rows = [("", "streammerge", "mergekit", "PEFT"), ("---",) * 4]
    for label, name, job, contenders in COMPARED:
        found = newest[name]["methods"][job]["contenders"]
        rows.append((label, *(render_measures(found[each]) if each else "" for each in contenders)))
    table = "\n".join(f"| {' | '.join(row)} |" for row in [*rows, *ALTERNATIVES])
    return parts | {"alternatives": table}


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
