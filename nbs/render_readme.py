"""Renders nbs/index.ipynb to README.md: markdown as it is, code in fences, text output indented below its code.

`python nbs/render_readme.py` writes the file; tests/test_project.py calls `render()` and compares.
"""
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Rendered from nbs/index.ipynb by nbs/render_readme.py (`make export`); edit the notebook. -->\n"


def render_cell(cell: dict) -> str:
    "One notebook cell as Markdown; cells that begin with `#| hide` vanish."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source
    if source.startswith("#| hide"): return ""
    shown = [f"```python\n{source}\n```"]
    for output in cell.get("outputs", []):
        text = output.get("text") or output.get("data", {}).get("text/plain") or ""
        if text: shown.append("\n".join(f"    {line}" for line in "".join(text).rstrip().splitlines()))
    return "\n\n".join(shown)


def render(notebook: Path = HERE / "index.ipynb") -> str:
    "The README's text."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    body = "\n\n".join(text for text in map(render_cell, cells) if text)
    return NOTE + "\n" + body.replace("](images/", "](nbs/images/") + "\n"


if __name__ == "__main__":
    (HERE.parent / "README.md").write_text(render(), encoding="utf-8")
