"""Positions of three rows: text counts on, pictures lie at their rows and columns."""

from __future__ import annotations

import pytest

from lmdeploy.vl.mrope import GridSpan, mrope_positions


def test_text_alone():
    positions, delta = mrope_positions(5, [])
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3 and delta == 0


def test_a_picture_among_text():
    positions, delta = mrope_positions(10, [GridSpan(2, 2, 3)])
    assert positions.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5, 6], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
                                  [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]]  # fmt: skip
    assert delta == 7 - 10


def test_a_picture_at_either_end_and_two_side_by_side():
    positions, delta = mrope_positions(6, [GridSpan(0, 4, 1), GridSpan(4, 1, 2)])
    assert positions.tolist() == [[0, 0, 0, 0, 4, 4], [0, 1, 2, 3, 4, 4], [0, 0, 0, 0, 4, 5]]
    assert delta == 6 - 6


@pytest.mark.parametrize('spans', [[GridSpan(0, 2, 2), GridSpan(3, 1, 1)], [GridSpan(5, 2, 2)]])
def test_spans_that_cannot_be(spans):
    with pytest.raises(ValueError, match='a picture at'):
        mrope_positions(8, spans)
