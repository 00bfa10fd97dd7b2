"""Reads an HTML page as strictly as a test wants: every tag closed, nothing loaded."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "br"}
_LOADING = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "source", "image"}


class Page(HTMLParser):
    """The elements, texts and attributes of a page. Raises AssertionError for a tag that is not closed in its place."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def loads_nothing(content: str) -> bool:
    """Whether a page refers to nothing outside itself and runs nothing."""
    page = Page(content)
    attributes = [name for _, found in page.tags for name in found]
    return (
        not _LOADING & {tag for tag, _ in page.tags}
        and not {"src", "href", "xlink:href", "srcset", "action"} & set(attributes)
        and not any(name.startswith("on") for name in attributes)
        and not any(word in content for word in ("url(", "@import", "@font-face"))
    )
