from __future__ import annotations

import pytest

from sevenfold.data import personal

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc+/=\n-----END RSA PRIVATE KEY-----"


@pytest.fixture(scope="module")
def mask() -> personal.Masker:
    return personal.masker()


@pytest.mark.parametrize(
    ("text", "masked", "kind"),
    [
        ("Write to jane.doe+x@mail.example.org now", "Write to <EMAIL> now", "email"),
        ("from 8.8.4.4:80", "from <IP_ADDRESS>:80", "ip"),
        ("call (212) 555-0147.", "call <PHONE>.", "phone"),
        ("call 1-800-555-0199!", "call <PHONE>!", "phone"),
        ("call +44 20 7946 0958 or", "call <PHONE> or", "phone"),
        ("call +49 (0)30 901820, please", "call <PHONE>, please", "phone"),
        ("call 0161 496 0000", "call <PHONE>", "phone"),
        (f"see\n{PEM}\nend", "see\n<KEY>\nend", "key"),
        ("id AKIAIOSFODNN7EXAMPLE;", "id <KEY>;", "key"),
        (f"push with ghp_{'a1' * 18}", "push with <KEY>", "key"),
        (f"sk-proj-{'Ab1_' * 10} is", "<KEY> is", "key"),
        ("API_KEY = 'd41d8cd98f00b204e980'", "API_KEY = '<KEY>'", "key"),
        ('"client_secret": "Zm9vYmFyMTIzNDU2Nzg5"', '"client_secret": "<KEY>"', "key"),
    ],
)
def test_personal_data_are_masked_and_counted(
    mask: personal.Masker, text: str, masked: str, kind: str
) -> None:
    assert mask(text) == (masked, {kind: 1})
    assert mask(masked) == (masked, {})


@pytest.mark.parametrize(
    "text",
    [
        "In 1914-1918 and 2001-2002, pages 212-555 and 1,234,567,890.",
        "ISBN 978-3-16-148410-0; 192.168.0.1 and 127.0.0.1 are nobody's",
        "coordinates +12 34 56 and +123 4444 4444 4444 4444, part A212-555-0147",
        "3.141592653589793 and 2024-05-17 12:30:45, 0.1234 5678",
        "He said: password: correct horse battery staple",
        "token = tokenizer.convert_tokens_to_ids",
        "Me@home, @someone and a @ b",
        "task-force-of-the-united-nations sk-",
    ],
)
def test_what_only_looks_alike_stays(mask: personal.Masker, text: str) -> None:
    assert mask(text) == (text, {})


def test_all_in_one_text_are_counted_by_kind(mask: personal.Masker) -> None:
    text = "a@b.org, c@d.org <EMAIL> 8.8.8.8 (212) 555-0147 (212) 555-0148 (212) 555-0149"
    assert mask(text)[1] == {"email": 2, "ip": 1, "phone": 3}
