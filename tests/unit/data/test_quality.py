from __future__ import annotations

import ftfy
import numpy as np
import pytest

from sevenfold.base.errors import UsageError
from sevenfold.data import quality

PROSE = (
    "The harbour was quiet that morning, and the fishermen stood about with their hands in their "
    "pockets. Nobody had seen the boat come back. Mrs Hale asked twice, and each time the answer "
    "was the same: wait until the tide turns. So she waited with her basket on the wall.\n\n"
    "By noon the wind had risen, and two of the younger men rowed out to look for it. They found "
    "an oar, a hat, and nothing more. That evening all the windows of the village were lit, so "
    "that whoever was still out there might find the way to shore in the dark and the rain."
)
MENU = "Home\nAbout us\nContact\nHome\nAbout us\nContact\n" * 20


def judge(name: quality.QualityName, text: str) -> str | None:
    given = {"id": "a", "text": text}
    return next((r for look in quality.quality_filters([name]) if (r := look(given))), None)


def test_wrongly_decoded_text_is_mended() -> None:
    repair = quality.repairer()
    assert repair("schÃ¶n â€œquotedâ€\x9d caf\u00e9") == "schön “quoted” café"
    assert repair("fish &amp; chips\x00") == "fish & chips"


@pytest.mark.parametrize("kept", ["“curly”", "ﬁne", "\uff21", "naïve — café", "a\tb\n", "1 < 2"])
def test_repair_leaves_what_is_no_mistake(kept: str) -> None:
    assert quality.repairer()(kept) == kept


def test_the_quick_look_before_repair_misses_nothing() -> None:
    """Whatever ftfy would change on its own is changed, wherever it stands in the text."""
    repair = quality.repairer()
    config = ftfy.TextFixerConfig(
        uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False,
        normalization=None, explain=False,
    )  # fmt: skip
    damaged = 0
    for code in (*range(0x20), *range(0x7F, 0x3000), 0xFEFF, *range(0xFFF0, 0xFFFE), 0x1F600):
        if chr(code) == "\r":
            continue  # normalise makes line feeds of all of them
        for given in (f"a {chr(code)}b — “c”", f"“{chr(code).encode().decode('latin-1')}” d"):
            assert repair(given) == ftfy.fix_text(given, config), hex(code)
            damaged += repair(given) != given
    assert damaged > 5000


def test_other_languages_are_dropped_by_name() -> None:
    look = quality.language_filter(["en", "de"])
    assert look({"text": PROSE}) is None
    assert look({"text": "Der Hafen war an diesem Morgen still, und niemand sprach."}) is None
    french = "Le port était calme ce matin-là, et personne ne disait rien du tout."
    assert look({"text": french}) == "language_fr"


def test_an_unknown_language_is_named() -> None:
    with pytest.raises(UsageError, match=r"clean\.languages: 'eng' is not a language .*mean 'en'"):
        quality.language_filter(["eng"])


@pytest.mark.parametrize("name", ["gopher", "fineweb"])
def test_prose_passes_the_filters(name: quality.QualityName) -> None:
    assert judge(name, PROSE) is None


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("gopher", "Too short to say anything.", "gopher_short_doc"),
        ("gopher", "word # " * 100, "gopher_too_many_hashes"),
        ("gopher", (PROSE + "\n\n") * 3, "gopher_dup_para_frac"),
        ("gopher", "the captain with nobody and the captain that " * 20, "gopher_top_2_gram"),
        ("c4", PROSE + "\nLorem ipsum dolor sit amet.", "c4_lorem_ipsum"),
        ("c4", MENU, "c4_too_few_sentences"),
        ("fineweb", MENU, "fineweb_line_punct_ratio"),
    ],
)
def test_what_reads_badly_is_dropped(name: quality.QualityName, text: str, reason: str) -> None:
    assert judge(name, text) == reason


def test_c4_takes_lines_out_of_what_it_keeps() -> None:
    given = {"id": "a", "text": f"Accept cookies\n{PROSE}\nWe use cookies to follow you."}
    (look,) = quality.quality_filters(["c4"])
    assert look(given) is None
    assert given["text"] == PROSE.replace("\n\n", "\n")


def test_repetition_is_judged_as_by_datatrove() -> None:
    """The quick bounds settle most texts, and never what datatrove would drop."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherRepetitionFilter

    random = np.random.default_rng(11)
    vocabulary = np.array([f"w{'xyz'[n % 3] * (n % 7)}{n}" for n in range(400)])
    judge = quality._RepetitionJudge(quality._word_splitter())
    slow = GopherRepetitionFilter(language=quality._word_splitter())
    verdicts, settled = [], 0
    for number in range(400):
        words = list(random.choice(vocabulary, random.integers(5, 300)))
        for _ in range(number % 8):  # a run of some words once more, somewhere
            start, count = random.integers(len(words)), random.integers(1, 14)
            place = random.integers(len(words))
            words[place:place] = words[start : start + count]
        document = Document(text=" ".join(words), id="a")
        verdicts.append(slow.filter(document))
        assert judge.filter(document) == verdicts[-1]
        settled += judge._repeats_little(document.text)
    assert 100 < sum(verdict is not True for verdict in verdicts) < 300
    assert settled > 100
