"""A report as blocks, written as Markdown and as HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = str | float | int | None

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccd; padding: 0.25rem 0.6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { background: #f0f1f6; } img { max-width: 100%; }
@media (prefers-color-scheme: dark) {
  body { background: #16171b; color: #e3e3e8; } th { background: #24262e; } th, td { border-color: #3a3d48; }
}
"""


@dataclass
class Document:
    """Blocks in order; text may hold `code` in backticks and nothing else of Markdown."""

    title: str
    _markdown: list[str] = field(default_factory=list)
    _html: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """A section."""
        self._markdown.append(f"## {text}\n")
        self._html.append(f"<h2>{_inline(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._markdown.append(text + "\n")
        self._html.append(f"<p>{_inline(text)}</p>")

    def items(self, items: Sequence[str]) -> None:
        """A list."""
        if items:
            self._markdown.append("".join(f"- {item}\n" for item in items))
            self._html.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table; the first column is text. None is a dash."""
        cells = [[_cell(cell) for cell in row] for row in rows]
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        self._markdown.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
        head = "".join(f"<th>{_inline(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        self._html.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def image(self, name: str, alternative: str) -> None:
        """A picture beside the report."""
        self._markdown.append(f"![{alternative}]({name})\n")
        self._html.append(f'<p><img src="{html.escape(name)}" alt="{html.escape(alternative)}"></p>')

    def write(self, folder: Path, markdown_name: str = "REPORT.md", page_name: str = "report.html") -> None:
        """Both forms."""
        folder.mkdir(parents=True, exist_ok=True)
        markdown = f"# {self.title}\n\n" + "\n".join(self._markdown)
        (folder / markdown_name).write_text(markdown, encoding="utf-8")
        page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
        page += f"<style>{_STYLE}</style><body><h1>{html.escape(self.title)}</h1>" + "\n".join(self._html)
        (folder / page_name).write_text(page + "</body></html>\n", encoding="utf-8")


def source(description: dict[str, Any]) -> str:
    """Machine, versions and commit of a result file."""
    where = description["gpu"] or f"CPU ({description['machine']})"
    versions = f"torch {description['torch']}, commit `{description['commit'][:12]}`, {description['date']}"
    return f"Measured on {where}, {versions}."


def _cell(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1e4 else f"{cell:.0f}"
    return str(cell)


def _inline(text: str) -> str:
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
