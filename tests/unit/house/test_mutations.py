"""The protections that bench/mutations.py takes out still stand where it looks for them."""

from __future__ import annotations

import pytest
from bench.mutations import MUTATIONS, REPOSITORY, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.row)
def test_the_protection_stands_there_once(mutation: Mutation) -> None:
    text = (REPOSITORY / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert (REPOSITORY / mutation.tests[0]).is_file()
