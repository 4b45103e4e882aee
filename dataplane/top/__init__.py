"""`dataplane top`: Services and their backends, live, on a terminal.

`history`, `listing`, `figures`, `columns`, `headings` and `palette` are pure: values in, text and styles out.
`screens`, `grid` and `app` are textual's; `looking` is the thread that takes looks, so that a slow one never stops the
screen.
"""
