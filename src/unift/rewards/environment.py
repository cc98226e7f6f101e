"""Which variables of the environment a scoring worker sees: all but those that look like secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_PARTS = r"PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY"  # anywhere in the name
_WORDS = r"TOKENS?|KEYS?|PASS|PWD|PW|AUTH|PAT|CREDS?|COOKIES?|JWT|BEARER|DSN|WEBHOOKS?"  # between underscores
_SECRET = re.compile(rf"{_PARTS}|(?:^|_)(?:{_WORDS})\d*(?:_|$)|(?:TOKEN|KEY)\d*$")
_LOGIN_IN_URL = re.compile(r"\w+://[^/\s:@]*:[^/\s@]+@")
_PLACES = ("PWD", "OLDPWD")  # working directories


def is_secret(name: str, value: str = "") -> bool:
    """Whether the name has the look of a token, key, password or credential, or the value is a URL with a password."""
    return (_SECRET.search(name.upper()) is not None and name not in _PLACES) or bool(_LOGIN_IN_URL.search(value))


def visible(environment: Mapping[str, str], named: Iterable[str] = ()) -> dict[str, str]:
    """The environment without secrets, except those that are named."""
    named = frozenset(named)
    return {name: value for name, value in environment.items() if name in named or not is_secret(name, value)}
