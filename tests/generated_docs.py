"""Parts of docs/ that are made from the code: compared by the tests, rewritten when UPDATE_DOCS is set."""

import os
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def check_generated(document: str, section: str, text: str) -> None:
    """Assert that `document` carries `text` between the marks of `section`; with UPDATE_DOCS=1, put it there."""
    path = DOCS / document
    begin, end = f"<!-- generated: {section} -->\n", "<!-- end of generated -->\n"
    content = path.read_text(encoding="utf-8")
    head, found, rest = content.partition(begin)
    assert found, f"docs/{document} has no section {section}"
    old, found, tail = rest.partition(end)
    assert found, f"docs/{document}: section {section} has no end"
    if old != text and os.environ.get("UPDATE_DOCS"):
        path.write_text(head + begin + text + end + tail, encoding="utf-8")
        return
    assert old == text, f"docs/{document} is stale: run the test with UPDATE_DOCS=1"
