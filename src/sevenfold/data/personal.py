"""Masks for what identifies people or opens doors: addresses, telephone numbers, keys.

E-mail and public IPv4 addresses are found by datatrove's expressions, the others by ours. Not
found: names, postal addresses, IPv6, telephone numbers without separators or with fewer than ten
digits and no country code, keys of unknown forms without a telling name before them.
``docs/data.md`` has what was measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Masker = Callable[[str], tuple[str, dict[str, int]]]

MASKS = {"email": "<EMAIL>", "ip": "<IP_ADDRESS>", "phone": "<PHONE>", "key": "<KEY>"}

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----.{0,20000}?"
    r"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    re.DOTALL,
)
# Forms that their issuers have chosen so that they can be found.
_ISSUED_KEY = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255}|glpat-[\w-]{20,64}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,250}|AIza[\w-]{35}|ya29\.[\w-]{20,250}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,250}|sk-[A-Za-z0-9_-]{20,250}"
    r"|hf_[A-Za-z]{30,64}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,250}|SG\.[\w-]{16,64}\.[\w-]{16,64}"
    r"|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,2000})(?![\w-])"
)
# Anything long with digits and letters after a telling name; the value is looked for first, as a
# sign of assignment is rarer than the beginnings of such names.
_VALUE = re.compile(r"[:=]\s{0,3}[\"']?([A-Za-z0-9+/_.=-]{16,250})")
_NAME = re.compile(
    r"(?:(?:api|access|secret|private|auth|account)[_-]?(?:key|token)|client[_-]?secret|secret"
    r"|passw(?:or)?d|token)[\"']?\s{0,3}$",
    re.IGNORECASE,
)
_NAME_CHARACTERS = 32
_PHONE = re.compile(
    r"(?<![\w.,+/(-])(?:"
    r"\+\d{1,3}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{1,4}){2,5}"  # +44 20 7946 0958
    r"|(?:\+?1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}"  # (212) 555-0147
    r"|\(?0\d{1,4}\)?[ /-]\d{3,4}[ -]?\d{3,4}"  # 0161 496 0000
    r")(?![\w/-]|[.,]\d)"
)
_FEWEST_DIGITS, _MOST_DIGITS = 10, 15


def masker() -> Masker:
    """Return what masks a text and counts what it masked, by kind.

    datatrove is imported here, which takes seconds.
    """
    from datatrove.pipeline.formatters import PIIFormatter

    formatter = PIIFormatter(email_replacement=MASKS["email"], ip_replacement=MASKS["ip"])
    replace_email, replace_ip = formatter.emails_replacer.replace, formatter.ip_replacer.replace

    def mask(text: str) -> tuple[str, dict[str, int]]:
        before = {kind: text.count(word) for kind, word in MASKS.items()}
        masked = _mask_keys(text)
        if "@" in masked:
            masked = replace_email(masked)
        masked = _PHONE.sub(_mask_phone, replace_ip(masked))
        if masked is text or masked == text:
            return text, {}
        after = {kind: masked.count(word) - before[kind] for kind, word in MASKS.items()}
        return masked, {kind: count for kind, count in after.items() if count > 0}

    return mask


def _mask_keys(text: str) -> str:
    if "PRIVATE KEY" in text:
        text = _PRIVATE_KEY.sub(MASKS["key"], text)
    text = _ISSUED_KEY.sub(MASKS["key"], text)
    return _VALUE.sub(_mask_named_key, text)


def _mask_named_key(found: re.Match[str]) -> str:
    value = found[1]
    mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    before = found.string[max(0, found.start() - _NAME_CHARACTERS) : found.start()]
    if not mixed or not _NAME.search(before):
        return found[0]
    return found[0].removesuffix(value) + MASKS["key"]


def _mask_phone(found: re.Match[str]) -> str:
    digits = sum(character.isdigit() for character in found[0])
    fewest = _FEWEST_DIGITS - 2 if found[0].startswith("+") else _FEWEST_DIGITS
    return MASKS["phone"] if fewest <= digits <= _MOST_DIGITS else found[0]
