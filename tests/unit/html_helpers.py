"""Pages of HTML as a browser would see them, for the tests of what writes them."""

from html.parser import HTMLParser


class Tags(HTMLParser):
    """Start tags with their attributes, and the text between tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
