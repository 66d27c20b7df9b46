"""An HTML page as a reader without a browser sees it."""

from html.parser import HTMLParser


class Parsed(HTMLParser):
    """Tags with their attributes, texts, and the rows of tables by section.

    >>> page = Parsed("<section id=a><table><tr><td>1 <b>x</b><td>2_<wbr>3</table></section>")
    >>> page.rows["a"], page.text
    ([['1 x', '2_3']], '1 x 2_3')
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.texts: list[str] = []
        self._section, self._hidden, self._in_table, self._joined = "", False, False, False
        self.feed(html)

    @property
    def text(self) -> str:
        """All that is shown."""
        return " ".join(" ".join(self.texts).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all tags of a name."""
        return [attributes for name, attributes in self.tags if name == tag]

    def handle_starttag(self, tag, attrs) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._hidden, self._joined = tag in ("script", "style"), tag == "wbr"
        if tag == "section":
            self._section = found.get("id") or ""
        rows = self.rows.setdefault(self._section, [])
        if tag == "table":
            self._in_table = True
        elif tag == "tr":
            rows.append([])
        elif tag in ("td", "th"):
            rows[-1].append("")

    def handle_endtag(self, tag) -> None:
        self._hidden = False
        if tag == "table":
            self._in_table = False

    def handle_data(self, data) -> None:
        if self._hidden:
            return
        space = "" if self._joined else " "  # a line may be broken there, and a word is not
        self.texts.append(self.texts.pop() + data if self._joined else data)
        rows = self.rows.get(self._section)
        if self._in_table and rows and rows[-1]:
            rows[-1][-1] = " ".join(f"{rows[-1][-1]}{space}{data}".split())
