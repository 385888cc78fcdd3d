"""Brings into the site what its pages link to beside docs/: the same links work on a code host.

Measurements and their pictures lie with the scripts that made them, and are shown from there.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
WIDE = ".md-grid { max-width: 74rem }"  # room for 100 columns of code
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def _target(page, link):
    """The path from the repository's root of what a page, named alike, links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _here(path):
    """Where a file of the repository is in the site: docs/ is its root."""
    return path.removeprefix("docs/")


def on_files(files, config):
    """Add what pages link to, and what that links to."""
    pending = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    found = set(pending)
    while pending:
        page = pending.pop()
        for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = _target(page, link)
            if path in found or path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            found.add(path)
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                pending.append(path)
    files.append(File.generated(config, "wide.css", content=WIDE))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between those of the site."""
    uri = page.file.src_uri
    source = uri if page.file.generated_by else f"docs/{uri}"

    def moved(link):
        return posixpath.relpath(_here(_target(source, link[1])), posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)
