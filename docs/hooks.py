"""What mkdocs does beside rendering docs/: other files of the repository can be linked, and functions by their names.

A file that a page links to, outside docs/, becomes part of the site below repository/, scripts as pages. On a
code-hosting page the same links lead to the files themselves.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()[^)\s#:]+")
NAME = re.compile(r"`src/(vlarft/[\w/]+)\.py:([\w.]+)`")


def links(page: File, text: str) -> Iterator[tuple[re.Match, str]]:
    """The links of a page to files: where each stands, and its target, from the top of the repository."""
    place = f"docs/{page.src_uri}".removeprefix("docs/repository/")
    for link in LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link[0]))
        if (ROOT / target).is_file():
            yield link, target


def in_site(target: str) -> str:
    """Where the site has a file of the repository."""
    suffix = ".md" if target.endswith(".py") else ""
    return target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}{suffix}"


def on_files(files, config):
    waiting = list(files.documentation_pages())
    for page in waiting:
        for _, target in links(page, page.content_string):
            if in_site(target) in files.src_uris:
                continue
            if target.endswith(".py"):
                code = (ROOT / target).read_text()
                text = f"---\nsearch: {{exclude: true}}\n---\n# {target}\n\n~~~python\n{code}~~~\n"
                files.append(File.generated(config, in_site(target), content=text))
            else:
                file = File.generated(config, in_site(target), abs_src_path=str(ROOT / target))
                files.append(file)
                waiting += [file] if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown, page, config, files):
    for link, target in reversed(list(links(page.file, markdown))):
        there = posixpath.relpath(in_site(target), posixpath.dirname(page.file.src_uri))
        markdown = markdown[: link.start()] + there + markdown[link.end() :]
    return NAME.sub(lambda name: f"[{name[0]}][{name[1].replace('/', '.')}.{name[2]}]", markdown)
