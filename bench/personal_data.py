"""How many planted addresses, telephone numbers and keys are masked, and what else is.

    python bench/personal_data.py SEED FILE...

The files are JSON Lines with `text`; into their texts some are planted between two words. What is
masked in the texts as they are is printed, to be looked at: real ones and false alarms.
"""

from __future__ import annotations

import json
import random
import string
import sys
from collections import Counter
from pathlib import Path

from sevenfold.base.console import print_raw
from sevenfold.data import personal

ALPHANUMERIC = string.ascii_letters + string.digits


def planted(kind: str, draw: random.Random) -> tuple[str, str]:
    """Return the form and the text of something to be found."""

    def digits(count: int) -> str:
        return "".join(draw.choices("0123456789", k=count))

    def letters(count: int, of: str = ALPHANUMERIC) -> str:
        return "".join(draw.choices(of, k=count))

    area, office = (f"{draw.randint(200, 999)}" for _ in range(2))
    name, host = letters(6, string.ascii_lowercase), letters(7, string.ascii_lowercase)
    forms = {
        "email": {
            "plain": f"{name}@{host}.com",
            "dotted": f"{name}.{letters(4)}+list@mail.{host}.co.uk",
            "spelt out": f"{name} [at] {host} [dot] com",
        },
        "ip": {"IPv4": ".".join(str(draw.randint(12, 99)) for _ in range(4))},
        "phone": {
            "(212) 555-0147": f"({area}) {office}-{digits(4)}",
            "212-555-0147": f"{area}-{office}-{digits(4)}",
            "212.555.0147": f"{area}.{office}.{digits(4)}",
            "+1 212 555 0147": f"+1 {area} {office} {digits(4)}",
            "+44 20 7946 0958": f"+44 20 {digits(4)} {digits(4)}",
            "+4930901820": f"+49{draw.randint(2, 9)}{digits(9)}",
            "0161 496 0000": f"0{draw.randint(100, 999)} {digits(3)} {digits(4)}",
            "2125550147": f"{area}{office}{digits(4)}",
            "555-0147": f"{office}-{digits(4)}",
        },
        "key": {
            "AWS": f"AKIA{letters(16, string.ascii_uppercase + string.digits)}",
            "GitHub": f"ghp_{letters(36)}",
            "sk-": f"sk-{letters(48)}",
            "Google": f"AIza{letters(35)}",
            "JWT": f"eyJ{letters(30)}.eyJ{letters(60)}.{letters(43)}",
            "PEM": f"-----BEGIN PRIVATE KEY-----\n{letters(200)}\n-----END PRIVATE KEY-----",
            "api_key = '...'": f"api_key = '{letters(15)}7{letters(12)}'",
            "password: ...": f"password: {letters(15)}7{letters(4)}",
            "40 hexadecimal digits": letters(40, "0123456789abcdef"),
        },
    }
    form = draw.choice(sorted(forms[kind]))
    return form, forms[kind][form]


def main() -> None:
    """Plant, mask, count and print."""
    draw = random.Random(int(sys.argv[1]))
    files = [Path(name).read_text(encoding="utf-8") for name in sys.argv[2:]]
    lines = [line for file in files for line in file.splitlines()]
    texts = [json.loads(line)["text"] for line in lines]
    mask = personal.masker()
    real: Counter[str] = Counter()
    tried: Counter[tuple[str, str]] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    for text in texts:
        clean, masked = mask(text)
        real.update(masked)
        kind = draw.choice(sorted(personal.MASKS))
        form, secret = planted(kind, draw)
        words = clean.split(" ")
        place = draw.randrange(len(words) + 1)
        given = " ".join([*words[:place], secret, *words[place:]])
        after, _ = mask(given)
        tried[kind, form] += 1
        found[kind, form] += secret not in after
    print_raw(f"masked in {len(texts)} texts as they are: {dict(real)}\n")
    for kind, form in sorted(tried):
        print_raw(f"{kind:6} {form:24} {found[kind, form]:5} of {tried[kind, form]:5}\n")


if __name__ == "__main__":
    main()
