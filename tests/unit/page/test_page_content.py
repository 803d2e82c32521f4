"""The page's content and its refusals: hostile names, headers, hosts, tokens, long lists, missing parts."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass, field
from datetime import timedelta
from html.parser import HTMLParser
from uuid import UUID

import pytest

from support.documents import CHECKOUT
from support.page_client import ask, page_of
from support.page_overview import (
    HOSTILE,
    NOW,
    PLATFORM,
    VAULT,
    busy_host,
    disk,
    hostile_host,
    layer,
    overview,
)
from virt_sse.page.access import LINK_SECONDS, Sessions, is_loopback_name, new_code
from virt_sse.page.alerts import Level, alerts
from virt_sse.page.application import HEADERS
from virt_sse.page.document import FaultPart, Overview, Settings, decode, encode
from virt_sse.page.views import PAGE_SIZE, Index, Page, middle, size

TOKEN = "ab" * 32
SHOWN = ("copies", "unfinished", "deleted")
LISTS = ("/", "/domains", "/disks", *(f"/disks?show={each}" for each in SHOWN), "/keys", "/audit")


def key_page(key: str) -> str:
    return f"/keys/{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def all_pages(document: Overview) -> list[str]:
    found = [*LISTS, *(f"/disks/{each.id}" for each in document.disks)]
    found += [f"/domains/{each.id}" for each in document.domains]
    return found + [
        key_page(key) for key in {part.key for each in document.disks for part in each.layers if part.key}
    ]


@dataclass
class Seen:
    """What a browser makes of a document."""

    tags: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    scripts: list[str | None] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


class Browser(HTMLParser):
    def __init__(self, body: str) -> None:
        super().__init__()
        self.seen = Seen()
        self.feed(body)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.tags.add(tag)
        self.seen.attributes |= {name for name, _ in attrs}
        values = dict(attrs)
        self.seen.links |= {value or "" for name, value in attrs if name in ("href", "src")}
        if tag == "script":
            self.seen.scripts.append(values.get("src"))

    def handle_data(self, data: str) -> None:
        self.seen.text.append(data)


@pytest.mark.parametrize("name", HOSTILE, ids=[ascii(name)[:24] for name in HOSTILE])
def test_names_are_text_whatever_they_hold(name: str) -> None:
    harmless = hostile_host("harmless")
    document = hostile_host(name)
    app, usual = page_of(document), page_of(harmless)
    for target, same in zip(
        all_pages(decode(encode(document)[4:], Overview)), all_pages(harmless), strict=True
    ):
        answer, wanted = ask(app, target), Browser(ask(usual, same).body).seen
        assert answer.status == 200, target
        seen = Browser(answer.body).seen
        assert seen.tags == wanted.tags, target
        assert seen.attributes - {"title"} == wanted.attributes - {"title"}, target
        assert seen.scripts == ["/page.js"]
        assert all(link.startswith(("/", "#content")) for link in seen.links), target
        for character in ("\u202e", "\u2066", "\x00", "\x1b", "\udcff"):
            assert character not in answer.body
        assert len(answer.body) < 200_000


def test_no_page_has_inline_scripts_styles_or_forms() -> None:
    document = busy_host()
    app = page_of(document)
    for target in all_pages(document):
        answer = ask(app, target)
        assert answer.status == 200
        seen = Browser(answer.body).seen
        assert not seen.tags & {"style", "form", "input", "iframe", "object", "base"}
        assert "style" not in seen.attributes
        assert not any(name.startswith("on") for name in seen.attributes)
        for link in seen.links - {"#content"}:
            assert ask(app, link).status == 200, link


def test_deleted_disks_are_on_a_list_of_their_own() -> None:
    purge = NOW + timedelta(days=7)
    gone = disk(7, "gone", layer(), state="deleted", deleted=NOW, scheduled_purge=purge)
    app = page_of(overview(disks=(disk(1, "kept", layer()), gone)))
    for show, names in (("", ["kept"]), ("?show=unfinished", []), ("?show=deleted", ["gone"])):
        said = "".join(Browser(ask(app, f"/disks{show}").body).seen.text)
        assert [name for name in ("gone", "kept") if name in said] == names, show
    for target in ("/disks?show=deleted", f"/disks/{gone.id}"):
        assert "purge 2026-12-04 12:30:05 UTC" in " ".join(Browser(ask(app, target).body).seen.text), target


@pytest.mark.parametrize(
    "target", ["/", "/page.css", "/page.js", "/icon.svg", "/nowhere", "/disks/x", "/keys/x", "/disks/"]
)
def test_every_answer_has_the_policy(target: str) -> None:
    answer = ask(page_of(busy_host()), target)
    assert answer.status == (404 if target in ("/nowhere", "/disks/x", "/keys/x", "/disks/") else 200)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self'; script-src 'self'")
    assert "unsafe" not in policy
    assert HEADERS.keys() <= answer.headers.keys()
    refused = ask(page_of(busy_host()), target, host="evil.example")
    assert refused.status == 421
    assert HEADERS.keys() <= refused.headers.keys()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_only_reading_is_possible(method: str) -> None:
    answer = ask(page_of(busy_host()), "/", method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    assert ask(page_of(busy_host()), "/", "HEAD").status == 200


def test_names_that_do_not_belong_to_loopback_are_refused() -> None:
    good = ("localhost", "LOCALHOST:8088", "127.0.0.1", "127.0.0.1:1", "[::1]:8088")
    assert all(map(is_loopback_name, good))
    bad = (
        "",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.2",
        "[::1",
        "localhost:",
        "a@localhost",
        None,
    )
    assert not any(map(is_loopback_name, bad))
    app = page_of(busy_host())
    assert ask(app, host="").status == 421
    assert ask(app, sec_fetch_site="cross-site", sec_fetch_mode="no-cors").status == 403
    assert ask(app, sec_fetch_site="same-site", sec_fetch_mode="cors").status == 403
    assert ask(app, sec_fetch_site="cross-site", sec_fetch_mode="navigate").status == 200
    assert ask(app, "/" + "a" * 3000).status == 414


def test_loopback_needs_the_token_or_a_session() -> None:
    sessions = Sessions(TOKEN)
    app = page_of(busy_host(), sessions)
    for target in (*LISTS, "/page.css"):
        answer = ask(app, target)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert "orders" not in answer.body
    assert ask(app, authorization=f"Bearer {TOKEN}").status == 200
    for wrong in (
        f"Bearer {TOKEN[:-1]}",
        "Bearer ",
        f"Basic {TOKEN}",
        "Bearer \xff",
        TOKEN,
        f"Bearer {TOKEN}x",
    ):
        assert ask(app, authorization=wrong).status == 401
    assert ask(app, cookie=f"virt-sse-page={sessions.cookie}").status == 200
    assert ask(app, cookie=f"virt-sse-page={TOKEN}").status == 401
    assert ask(app, f"/?token={TOKEN}").status == 401
    assert ask(app, authorization=f"Bearer {TOKEN}", host="evil.example").status == 421


def test_a_link_is_valid_once_and_for_ten_minutes() -> None:
    now = [1_800_000_000.0]
    sessions = Sessions(TOKEN, lambda: now[0])
    app = page_of(busy_host(), sessions)
    code = new_code(TOKEN, now[0])
    assert ask(app, f"/?token={code}", "HEAD").status == 401
    answer = ask(app, f"/disks?token={code}")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    assert ask(app, f"/?token={code}").status == 401
    assert ask(app, cookie=cookie.partition(";")[0]).status == 200
    late = new_code(TOKEN, now[0])
    now[0] += LINK_SECONDS + 1
    assert not sessions.redeem(late)
    assert not sessions.redeem(new_code("cd" * 32, now[0]))
    assert not sessions.redeem(new_code(TOKEN, now[0] + 10_000))
    fresh = new_code(TOKEN, now[0])
    until, _, rest = fresh.partition(".")
    assert not sessions.redeem(f"{int(until) - 1}.{rest}")
    assert not sessions.redeem("")
    assert sessions.redeem(fresh)


def test_settings_do_not_show_the_token() -> None:
    settings = Settings(group=None, loopback="127.0.0.1:1", token=TOKEN, user=None)
    assert TOKEN not in f"{settings!r}{settings}"
    assert decode(encode(settings)[4:], Settings) == settings


def test_thousands_of_disks_are_shown_in_parts() -> None:
    disks = tuple(disk(number, f"disk-{number:05}", layer(VAULT)) for number in range(1, 5001))
    app = page_of(overview(disks=disks))
    for target, first in (
        ("/disks", 1),
        ("/disks?page=100", 4951),
        ("/disks?page=999999", 4951),
        ("/disks?page=-1", 1),
    ):
        answer = ask(app, target)
        assert answer.body.count("/disks/0") == PAGE_SIZE
        assert f"disk-{first:05}" in answer.body
        assert len(answer.body) < 100_000
    assert "5000 in all" in answer.body
    assert 'rel="next"' not in ask(app, "/disks?page=100").body
    assert len(ask(app, key_page(VAULT)).body) < 20_000
    for wrong in ("", "x", "1e3", "\u0661", "9" * 400, "0", "1 or 1=1"):
        assert Page.of(disks, wrong).number == 1


def test_missing_parts_are_alerts_and_hide_nothing_else() -> None:
    fault = FaultPart(part="store", problem="cannot open the store: no such file", remedy=None)
    app = page_of(overview(domains=busy_host().domains, faults=(fault,)))
    for target in LISTS:
        assert ask(app, target).status == 200
    body = ask(app).body
    assert "cannot open the store" in body
    assert "orders-db" in body


def test_the_picture_tells_the_layers_from_guest_to_storage() -> None:
    body = ask(page_of(busy_host()), f"/disks/{UUID(int=1)}").body
    words = (
        "/dev/vda in orders-db",
        "plaintext",
        "QEMU of the guest",
        "Storage daemon",
        "Host cache",
        "encrypted twice",
        "orders.qcow2",
    )
    picture = body[body.index("<svg") : body.index("</svg>")]
    places = [
        picture.index(word, picture.index("<defs>"))
        for word in words
        if word not in ("plaintext", "encrypted twice")
    ]
    assert places == sorted(places)
    assert all(word in picture for word in words)
    assert "vault-west" in picture


def test_what_stops_names_domains_actions_and_grace() -> None:
    index = Index(busy_host())
    stops = index.stops(next(key for key in index.keys.values() if key.key == PLATFORM))
    assert [(stop.domain.name, stop.action) for stop in stops] == [
        ("mail", "shutdown"),
        ("orders-db", "shutdown"),
        ("web", None),
    ]
    body = ask(page_of(busy_host()), key_page(VAULT)).body
    assert "destroyed after 60 s" in body
    assert "cannot start" in body


def test_alerts_come_in_the_order_of_their_urgency() -> None:
    found = alerts(busy_host())
    levels = [list(Level).index(alert.level) for alert in found]
    assert levels == sorted(levels)
    assert {alert.title for alert in found} >= {
        "Key revoked",
        "Plaintext image",
        "Unprotected disk",
        "Set-up fault",
    }
    assert alerts(overview()) == []
    assert "No alerts" in ask(page_of(overview())).body


def test_long_texts_and_sizes() -> None:
    assert middle("a" * 30, 9) == "aaaa…aaaa"
    assert middle("short", 9) == "short"
    assert [size(0), size(1536), size(64 << 40)] == ["0 B", "1.5 KiB", "64 TiB"]


def test_templates_and_files_are_part_of_the_wheel() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["virt_sse.page"]
    folder = CHECKOUT / "backend/virt_sse/page"
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert len(files) > 10
    assert [path.name for path in files if not any(path.match(pattern) for pattern in patterns)] == []
