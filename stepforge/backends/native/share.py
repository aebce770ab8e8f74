"""The C function by which threads share the rows of a table."""

from __future__ import annotations

import textwrap

__all__ = ["share_function"]


def share_function(each: str) -> str:
    """Return the function ``share``, which works on a thread's part of all rows.

    A part has about as many units as any other, and a whole number of grains.

    Args:
        each: the statements for the units of a row from ``begin`` up to ``stop``. They and the
            function read ``w``, a ``work`` with ``rows``, ``starts``, ``records``, ``thread`` and
            ``team``, and the macros ``AHEAD``, ``COLUMNS``, ``GRAIN`` and ``RECORD``.
    """
    return f"{_BEGIN}{textwrap.indent(each, 8 * ' ')}{_END}"


_BEGIN = """\
/* Asks for where a row begins: the processor foresees what follows, but not that. */
static void fetch(const work *w, int64_t row) {
    for (int column = 0; row < w->rows && column < COLUMNS; column++)
        __builtin_prefetch(w->records[row * RECORD + column]);
}

static void share(void *argument) {
    const work *w = argument;
    int64_t total = w->starts[w->rows];
    int64_t threads = w->thread ? w->team() : 1;
    int64_t part = (total / threads + GRAIN) / GRAIN * GRAIN;
    int64_t begin = w->thread ? w->thread() * part : 0;
    int64_t end = begin + part < total ? begin + part : total;
    if (begin >= end) return;
    int64_t low = 0, high = w->rows;    /* the last row that starts at or before begin */
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (w->starts[middle] <= begin) low = middle; else high = middle;
    }
    for (int64_t row = low; begin < end; row++) {
        int64_t stop = w->starts[row + 1] < end ? w->starts[row + 1] : end;
        fetch(w, row + AHEAD);
"""
_END = """\
        begin = stop;
    }
}

"""
