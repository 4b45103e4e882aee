"""The screens: all Services, one Service, the filter's line, help."""

from typing import TYPE_CHECKING, ClassVar, cast

from rich.table import Table as RichTable
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, Input, Static

from ..printable import printable
from . import headings
from .columns import OVERVIEW, PAGE, Column
from .grid import Grid, Lines, Titles, titles
from .history import Key
from .listing import ORDERS, Entry, Listing, arranged, arranged_backends, entries, words_of

if TYPE_CHECKING:
    from .app import Top

SORT_KEYS: tuple[BindingType, ...] = (
    Binding("s", "sort_next", "sort"),
    Binding("S", "sort_before", show=False),
    Binding("less_than_sign", "sort_before", show=False),
    Binding("greater_than_sign", "sort_next", show=False),
    Binding("r", "reverse", "reverse"),
)


class Table(Screen[None]):
    """A heading, titles and a table."""

    COLUMNS: ClassVar[tuple[Column, ...]]

    def __init__(self, top: "Top", sort: str) -> None:
        super().__init__()
        self.top = top
        self.sort = sort
        self.backwards = False
        self.heading = Lines(top.named, classes="heading")
        self.titles = Titles(top.named, classes="titles")
        self.grid = Grid(self.COLUMNS, top.drawing, top.named, plain=top.plain)

    def compose(self) -> ComposeResult:
        """From top to bottom."""
        yield self.heading
        yield self.titles
        yield self.grid
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """The table has the keys."""
        self.grid.focus()
        self.rearrange()

    def on_resize(self, event: events.Resize) -> None:
        """Other widths of columns."""
        self.call_after_refresh(self.draw)

    def on_screen_resume(self) -> None:
        """What has happened meanwhile."""
        self.rearrange()

    def rearrange(self) -> None:
        """Sort and filter anew, and draw."""
        self.grid.show(self.order())
        self.draw()

    def order(self) -> Listing:
        """The lines of the table."""
        raise NotImplementedError

    def draw(self) -> None:
        """Heading and titles, and the clocks in the table."""
        self.titles.placed = self.grid.placed
        self.titles.show([titles(self.grid, self.sort, backwards=self.backwards)])
        self.grid.refresh()

    def _sorts(self) -> list[str]:
        return [placed.column.sort for placed in self.grid.placed if placed.column.sort]

    def action_sort_next(self) -> None:
        """The next column to the right."""
        self._sort_beside(1)

    def action_sort_before(self) -> None:
        """The next column to the left."""
        self._sort_beside(-1)

    def _sort_beside(self, by: int) -> None:
        sorts = self._sorts()
        index = sorts.index(self.sort) if self.sort in sorts else -1
        self.sort_by(sorts[(index + by) % len(sorts)])

    def sort_by(self, sort: str) -> None:
        """That way round that people want first."""
        self.sort, self.backwards = sort, False
        self.rearrange()

    def action_reverse(self) -> None:
        """The other way round."""
        self.backwards = not self.backwards
        self.rearrange()

    def on_titles_clicked(self, event: Titles.Clicked) -> None:
        """A click on a title."""
        if event.sort == self.sort:
            self.action_reverse()
        else:
            self.sort_by(event.sort)


class Overview(Table):
    """All Services with their backends."""

    COLUMNS = OVERVIEW
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "page", key_display="Enter"),
        # with priority: before the keys that are typed after it go to whoever has the focus now
        Binding("slash", "filter", "filter", key_display="/", priority=True),
        *SORT_KEYS,
        Binding("b", "backends", "fold"),
        Binding("escape", "clear", show=False),
    ]

    def __init__(self, top: "Top", sort: str) -> None:
        super().__init__(top, sort)
        self.backends = True
        self.entry = Input(compact=True, select_on_focus=False)
        self.entry_line = Horizontal(Static("/", markup=False), self.entry, classes="filter")

    def compose(self) -> ComposeResult:
        """With a line for the filter, which takes the place of the keys."""
        yield from super().compose()
        yield self.entry_line

    def on_mount(self) -> None:
        """Without a filter."""
        self.entry_line.display = False
        super().on_mount()

    @property
    def words(self) -> tuple[str, ...]:
        """What is filtered by."""
        return words_of(self.entry.value)

    def order(self) -> Listing:
        """Services in their order, each with its backends."""
        return arranged(self.top.entries, self.sort, backwards=self.backwards, words=self.words, backends=self.backends)

    def draw(self) -> None:
        """With the sums."""
        situation = self.top.situation(words=self.words, shown=self.grid.lines.services)
        self.heading.show(headings.overview(situation, self.top.history, self.top.size.width))
        super().draw()

    def action_open(self) -> None:
        """The page of the Service under the cursor."""
        self.grid.action_open()

    def on_grid_opened(self, event: Grid.Opened) -> None:
        """Enter."""
        self.top.push_screen(
            Page(self.top, self.top.find(event.line.key[:2]) or entries([event.line.service])[0], event.line.key)
        )

    def action_backends(self) -> None:
        """Services only, or backends too."""
        self.backends = not self.backends
        self.rearrange()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Within the filter a slash is a letter."""
        return not (action == "filter" and self.focused is self.entry)

    def action_filter(self) -> None:
        """Ask for words."""
        self.entry_line.display = True
        self.set_focus(self.entry)  # at once: the next keys may be here already

    def on_input_changed(self, event: Input.Changed) -> None:
        """While somebody types."""
        self.rearrange()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter keeps the filter."""
        self._leave_entry()

    def action_clear(self) -> None:
        """Escape takes it away."""
        self.entry.value = ""
        self._leave_entry()
        self.rearrange()

    def _leave_entry(self) -> None:
        self.entry_line.display = False
        self.set_focus(self.grid)


class Page(Table):
    """One port of a Service at one address."""

    COLUMNS = PAGE
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "all Services", key_display="Esc"),
        Binding("backspace,left", "back", show=False),
        *SORT_KEYS,
    ]

    def __init__(self, top: "Top", entry: Entry, key: Key) -> None:
        super().__init__(top, "rate")
        self.entry = entry
        self.gone = False
        self._start = key

    def on_mount(self) -> None:
        """With the cursor at the backend from which somebody came."""
        super().on_mount()
        if len(self._start) > 2:
            self.call_after_refresh(self.grid.select, self._start)

    def order(self) -> Listing:
        """The backends as they are now; of a Service that has gone, as they were."""
        found = self.top.find(self.entry.key)
        self.gone = found is None
        self.entry = found or self.entry
        return arranged_backends(self.entry, self.sort, self.top.history.hits, backwards=self.backwards)

    def draw(self) -> None:
        """With the facts of the Service."""
        width, height = self.top.size
        lines = headings.page(self.top.situation(), self.entry.row, self.top.history, width, height, gone=self.gone)
        self.heading.styles.height = len(lines)
        self.heading.show(lines)
        super().draw()

    def action_back(self) -> None:
        """To all Services."""
        self.top.pop_screen()


KEYS = (
    ("Enter", "page of the Service under the cursor; Escape, Backspace or ← goes back"),
    ("/", "filter: words that have to be in a name, address or state; Escape clears it"),
    ("s  S  < >", "sort by the next column, or the one before; a click on a title does it too"),
    ("r", "reverse the order"),
    ("b", "Services only, or with their backends"),
    ("p  Space", "pause: nothing is read until it goes on"),
    ("+  -", "longer and shorter interval"),
    ("F5", "look now"),
    ("↑ ↓ j k g G", "move, also by pages, Home and End"),
    ("q  Ctrl+C", "quit"),
)
TERMS = (
    ("CONN/S", "new connections per second since the look before"),
    ("SHARE", "a backend's part of its Service's new connections of the last minute"),
    ("HITS", "new connections that were led there, and OF HITS its part of them all"),
    ("LAST 60 S", "backends of a Service have one scale; ▁ is none, a blank: nobody looked"),
    ("draining 14:32", "no new connections; removed when the last has ended or the clock is at 0"),
    ("weight 0", "no new connections, for another reason than draining"),
)


class Help(ModalScreen[None]):
    """Keys, and what the columns mean."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,enter,q", "dismiss", "back")]

    def compose(self) -> ComposeResult:
        """In a box."""
        top = cast("Top", self.app)
        counts = printable(str(top.look.counts if top.look is not None else "nobody yet"), 2000)
        table = RichTable.grid(padding=(0, 2))
        for title, rows in (("Keys", KEYS), ("Columns", TERMS), ("Counted by", (("", counts),))):
            table.add_row(Text(title, top.named["service"]))
            for word, meaning in rows:
                table.add_row(Text(f"  {word}", top.named["key"]), Text(meaning, top.named["text"]))
            table.add_row()
        box = VerticalScroll(Static(table, markup=False), classes="help")
        box.border_title = "dataplane top"
        box.border_subtitle = "Escape"
        yield box

    async def action_dismiss(self, result: None = None) -> None:
        """Back."""
        self.dismiss(None)


assert all(column.sort in ORDERS for column in (*OVERVIEW, *PAGE) if column.sort)
