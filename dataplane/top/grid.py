"""The table: only the lines in sight are drawn, so ten thousand Services cost as much as twenty."""

from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from . import palette
from .columns import Column, Drawing, Parts, Placed, column_at, layout, line_parts, title_parts
from .history import Key
from .listing import ORDERS, Line, Listing


def strip(parts: Parts, styles: dict[str, Style], over: Style | None = None) -> Strip:
    """Parts as textual draws them. Plain segments: nothing in a text is ever taken for markup."""
    return Strip([Segment(text, styles[name] if over is None else styles[name] + over) for text, name in parts if text])


class Lines(Widget):
    """A few lines of parts, which somebody else composes."""

    def __init__(self, styles: dict[str, Style], *, classes: str = "") -> None:
        super().__init__(classes=classes)
        self._named = styles
        self.lines: list[Parts] = []

    def show(self, lines: list[Parts]) -> None:
        """Draw these from now on."""
        if lines != self.lines:
            self.lines = lines
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """One of them."""
        if y >= len(self.lines):
            return Strip.blank(self.size.width, self._named["text"])
        line = strip(self.lines[y], self._named)
        # the line goes on as it ends
        return line.adjust_cell_length(self.size.width, self._named[self.lines[y][-1][1]])


class Titles(Lines):
    """The titles of the columns; a click sorts."""

    class Clicked(Message):
        """`sort`: by what."""

        def __init__(self, sort: str) -> None:
            super().__init__()
            self.sort = sort

    placed: Sequence[Placed] = ()

    def on_click(self, event: events.Click) -> None:
        """Sort by the column; by the same one again: the other way round."""
        column = column_at(self.placed, event.x)
        if column is not None and column.sort:
            self.post_message(self.Clicked(column.sort))


class Grid(ScrollView, can_focus=True):
    """Lines with a cursor, which stays with its Service or backend wherever sorting moves it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup,ctrl+b", "move_page(-1)", show=False),
        Binding("pagedown,ctrl+f", "move_page(1)", show=False),
        Binding("home,g", "move(-1000000000)", show=False),
        Binding("end,G", "move(1000000000)", show=False),
    ]

    class Opened(Message):
        """Somebody wants to see more of a line."""

        def __init__(self, line: Line) -> None:
            super().__init__()
            self.line = line

    def __init__(self, columns: Sequence[Column], drawing: Drawing, styles: dict[str, Style], *, plain: bool) -> None:
        super().__init__()
        self._columns = columns
        self._drawing = drawing
        self._named = styles
        self._over = palette.cursor(plain=plain)
        self.lines = Listing()
        self.cursor = 0
        self._follows = False  # a cursor that nobody has moved stays at the top, with whoever is first

    @property
    def line(self) -> Line | None:
        """Where the cursor is."""
        return self.lines[self.cursor] if self.cursor < len(self.lines) else None

    @property
    def placed(self) -> list[Placed]:
        """Columns at the present width."""
        return layout(self._columns, self.size.width)

    def show(self, lines: Listing) -> None:
        """Other lines; the cursor goes where its line has gone, at the same height of the screen if it can."""
        was = self.line
        above = self.cursor - self.scroll_offset.y
        self.lines = lines
        self.virtual_size = Size(max(1, self.size.width - 1), len(lines))
        if was is not None and self._follows:
            found = lines.find(was.key)
            if found is None:
                found = min(self.cursor, max(0, len(lines) - 1))
            if found != self.cursor:
                self.cursor = found
                self.scroll_to(y=found - above, animate=False, immediate=True)
        else:
            self.cursor = min(self.cursor, max(0, len(lines) - 1))
        self.refresh()

    def select(self, key: Key) -> None:
        """Put the cursor there."""
        found = self.lines.find(key)
        if found is not None:
            self._place(found)

    def action_move(self, by: int) -> None:
        """Lines down; negative: up."""
        self._place(self.cursor + by)

    def action_move_page(self, by: int) -> None:
        """Screens down; negative: up."""
        self._place(self.cursor + by * max(1, self.size.height - 1))

    def _place(self, index: int) -> None:
        self.cursor = max(0, min(index, len(self.lines) - 1))
        self._follows = self.cursor > 0
        top, height = self.scroll_offset.y, self.size.height
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False, immediate=True)
        elif self.cursor >= top + height:
            self.scroll_to(y=self.cursor - height + 1, animate=False, immediate=True)
        self.refresh()

    def action_open(self) -> None:
        """Enter, or a second click."""
        if self.line is not None:
            self.post_message(self.Opened(self.line))

    def on_click(self, event: events.Click) -> None:
        """Put the cursor there; twice: open."""
        index = event.y + self.scroll_offset.y
        if index < len(self.lines):
            self._place(index)
            if event.chain == 2:
                self.action_open()

    def on_resize(self) -> None:
        """The cursor stays in sight."""
        self.virtual_size = Size(max(1, self.size.width - 1), len(self.lines))
        self._place_in_sight()

    def _place_in_sight(self) -> None:
        if self.cursor >= self.scroll_offset.y + self.size.height:
            self.scroll_to(y=self.cursor - self.size.height + 1, animate=False, immediate=True)

    def render_line(self, y: int) -> Strip:
        """One line in sight."""
        width = self.scrollable_content_region.width
        index = y + self.scroll_offset.y
        if index >= len(self.lines):
            return Strip.blank(width, self._named["text"])
        here = index == self.cursor
        parts = line_parts(self.lines[index], self.placed, self._drawing, "▸" if here else " ")
        drawn = strip(parts, self._named, self._over if here else None)
        return drawn.adjust_cell_length(width, self._over if here else None)


def titles(grid: Grid, sort: str, *, backwards: bool) -> Parts:
    """The titles of a grid."""
    return title_parts(grid.placed, sort, backwards=backwards, highest_first=ORDERS[sort].highest_first)
