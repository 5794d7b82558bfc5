"""Secrets inside addresses: `user:password@`, and the values of a query, from which some gateways take their key.

The whole address is only ever sent. What is written, said or hashed is the address with `MASK` in the place of its secrets.
"""

import base64
import re
from urllib.parse import unquote, unquote_plus, urlsplit

MASK = "***"
OPEN_PARAMETERS = frozenset(
    {"api-version", "version", "model", "deployment", "provider", "region", "project"}
)
"""Parameters of a query whose values stay readable; any other may be a key, whatever it is called."""
SHORTEST_SECRET = 6
"""Characters; what is shorter is a placeholder such as EMPTY, and may be a part of any text."""

_PARTS = re.compile(
    r"(?P<scheme>[A-Za-z][\w+.-]*://)?(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<query>\?[^#]*)?(?P<fragment>#.*)?",
    re.DOTALL,
)
_HOST = re.compile(r"(\[[^\[\]@]*\]|[^:\[\]@]*)(:\d*)?")
_PARAMETER = re.compile(r"(?<=[?&])(?P<name>[^=&]*=)?+(?P<value>[^&]+)")
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://\S+")
_BARE_PASSWORD = re.compile(r"[^\s/@:='\"]+:[^\s/@]+@")
_KEY_FOR_ITS_NAME = re.compile(r"""(api_key_env["']?\s*[:=]\s*["']?)(?!got |wanted )[^\s"'},\]]+""")


def masked(text: str) -> str:
    """A message without the secrets of the addresses in it, nor a key that stands where its variable should be named."""
    text = _KEY_FOR_ITS_NAME.sub(rf"\1{MASK}", text)
    text = _ADDRESS.sub(lambda found: masked_address(found[0]), text)
    return _BARE_PASSWORD.sub(f"{MASK}@", text)


def masked_address(address: str) -> str:
    """An address with `MASK` for its user, password, fragment and the values of its query; unchanged where it has none."""
    found = _parts(address)
    host = found["authority"].rpartition("@")[2]
    if "@" in address and not _HOST.fullmatch(host):  # a password with a slash; the host is behind the last @
        return f"{found['scheme']}{MASK}@{masked_address(address.rpartition('@')[2])}"
    user = f"{MASK}@" if "@" in found["authority"] else ""
    query = _PARAMETER.sub(_masked_parameter, found["query"])
    fragment = f"#{MASK}" if len(found["fragment"]) > 1 else found["fragment"]
    return f"{found['scheme']}{user}{host}{found['path']}{query}{fragment}"


def secrets_in(address: str) -> list[str]:
    """What `masked_address` hides, in each form in which a server may repeat it."""
    found = _parts(address)
    user = found["authority"].rpartition("@")[0]
    values = [user, *user.split(":", 1), found["fragment"][1:]]
    values += [p["value"] for p in _PARAMETER.finditer(found["query"]) if _masked_parameter(p) != p[0]]
    forms = {form for value in values for form in (value, unquote(value), unquote_plus(value))}
    forms.add(basic_credentials(user))
    return [form for form in forms if len(form) >= SHORTEST_SECRET]


def address_fault(address: str) -> str | None:
    """Why nothing can be asked at an address; None where there is no reason."""
    try:
        parts = urlsplit(address)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port that is none
        is_whole = False
    if not is_whole or not address.startswith(("http://", "https://")):
        return "must start with http:// or https:// and name a host"
    if not address.isprintable() or " " in address:
        return "must be without spaces and line breaks"
    return None


def basic_credentials(user: str) -> str:
    """`user:password`, as it stands in an address, as HTTP's Basic scheme sends it."""
    name, _, password = user.partition(":")
    return base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode("ascii")


def _parts(address: str) -> dict[str, str]:
    found = _PARTS.fullmatch(address)
    assert found is not None, "every text is an address by this pattern"
    return found.groupdict("")


def _masked_parameter(found: re.Match[str]) -> str:
    name = found["name"] or ""
    return found[0] if name[:-1].lower() in OPEN_PARAMETERS else f"{name}{MASK}"
