"""Names of clients."""

from __future__ import annotations

import pytest

from fkd_med.communication import check_client_name
from fkd_med.errors import DataError


@pytest.mark.parametrize("name", ["a", "hospital 1", "Krankenhaus Köln", "病院", "a.b", "..a", "x" * 100, "é" * 100])
def test_names_of_any_script_are_accepted(name: str) -> None:
    assert check_client_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../x", "a\\b", "/", "a\nb", "a\0b", "\x1b[31m", " a", "a ", "x" * 101, "病" * 81, "\ud800"],
)
def test_names_that_could_be_paths_or_garble_a_terminal_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"Client name .*clients\.csv") as caught:
        check_client_name(name)
    assert str(caught.value).isprintable()
