"""`ai-assistant api …`: the API for the network, off by default, and its keys.

Nothing of ours runs as root for this: root's own systemctl enables the socket unit, and the daemon, which may open
no socket of the network itself, is given the one that systemd has opened. Keys are the daemon's, and asked for over
its unix socket, where the kernel says who asks.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ai_assistant.cli.group import Command
from ai_assistant.cli.options import Debug, Json, Yes, confirm, usage_error
from ai_assistant.cli.output import Output
from ai_assistant.errors import AIAssistantError, InternalError, InvalidArgument, NotAuthorized, ServiceUnavailable

UNIT = "ai-assistant-api-tcp.socket"
DAEMON = "ai-assistantd.service"
DEFAULT_PORT = 8443
_WAIT_S = 60.0
_DURATION = re.compile(r"([0-9]{1,6})(m|h|d)")
_UNITS_S = {"m": 60, "h": 3600, "d": 86400}

app = typer.Typer(
    help="Serve the API to the network, and look after its keys.", no_args_is_help=True, rich_markup_mode=None
)
keys = typer.Typer(
    help="Look after the keys that log in over the network.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(keys, name="key")

Root = Annotated[Path, typer.Option("--root", metavar="DIR", help="Write the files below DIR.", hidden=True)]
KeyName = Annotated[str, typer.Argument(metavar="NAME", help="What the key is called.")]


def _call(method: str, target: str, body: Mapping[str, Any] | None = None) -> Any:
    from ai_assistant import _http, _wire
    from ai_assistant._transport import socket_path

    return _wire.load(_http.call(socket_path(), method, target, body, timeout=30.0))


def _systemctl(*arguments: str) -> None:
    import subprocess

    try:
        done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ServiceUnavailable(f"systemctl cannot be run: {error.strerror}", hint="is this the appliance?") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise InternalError(f"systemctl {' '.join(arguments)} failed: {said[-1] if said else done.returncode}")


def _require_root() -> None:
    if os.geteuid() != 0:
        raise NotAuthorized("this changes what listens on the network", hint="run it with sudo")


@app.command("enable", cls=Command)
def enable(
    context: typer.Context,
    address: Annotated[
        str, typer.Option("--address", metavar="IP", help="Listen on this address only.", show_default=False)
    ] = "",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Listen on this port.")] = DEFAULT_PORT,
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", metavar="FILE", help="Your own certificate (PEM).", show_default=False),
    ] = None,
    private_key: Annotated[
        Path | None, typer.Option("--private-key", metavar="FILE", help="Its key (PEM).", show_default=False)
    ] = None,
    root: Root = Path("/"),
    yes: Yes = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve the API to the network, with TLS and keys. As root.

    Without a certificate of yours the device makes one; compare its fingerprint when a client first connects.
    The daemon is started again for it: running answers get a few seconds to end.

    \b
    Examples:
      ai-assistant api enable
      ai-assistant api enable --address 192.168.1.20 --port 443
      ai-assistant api enable --certificate box.crt --private-key box.key
    """
    out: Output = context.obj
    if (certificate is None) != (private_key is None):
        raise usage_error("--certificate and --private-key go together")
    listen = f"{_literal(address)}:{port}" if address else str(port)
    _require_root()
    confirm(out, f"Serve the API to the network on {listen}, and start the daemon again?", yes)
    if certificate is not None and private_key is not None:
        _install_certificate(root, certificate, private_key)
    _listen(root, listen)
    _systemctl("daemon-reload")
    _systemctl("enable", UNIT)
    _systemctl("restart", DAEMON)
    _show(out, _settled(True))
    out.note("Make a key for each client: ai-assistant api key add NAME")


@app.command("disable", cls=Command)
def disable(
    context: typer.Context, root: Root = Path("/"), yes: Yes = False, json: Json = False, debug: Debug = False
) -> None:
    """Close the API to the network again. Keys are kept. As root.

    \b
    Examples:
      ai-assistant api disable
    """
    out: Output = context.obj
    _require_root()
    confirm(out, "Close the API to the network, and start the daemon again?", yes)
    # The daemon holds the socket, too, so it is closed when both have let go.
    _systemctl("disable", UNIT)
    _systemctl("stop", UNIT)
    _systemctl("restart", DAEMON)
    _show(out, _settled(False))


@app.command("status", cls=Command)
def status(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """Show whether the API is served to the network, where, and the certificate's fingerprint.

    \b
    Examples:
      ai-assistant api status
      ai-assistant api status --json | jq -r .certificate.fingerprint_sha256
    """
    _show(context.obj, _call("GET", "/network"))


@keys.command("add", cls=Command)
def add(
    context: typer.Context,
    name: KeyName,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="infer or read; may be repeated. Both by default.", show_default=False),
    ] = None,
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="Good for so long, as in 90d or 12h.", show_default=False)
    ] = "",
    requests: Annotated[int, typer.Option("--requests", min=0, help="Requests per minute; 0: no limit.")] = 0,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="Tokens per minute; 0: no limit.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a key and show it, this once. For administrators.

    Only its hash is kept: a key that is lost is removed, and another made.

    \b
    Examples:
      ai-assistant api key add laptop
      ai-assistant api key add guest --scope infer --expires 7d --requests 60 --tokens 20000
    """
    out: Output = context.obj
    body: dict[str, Any] = {"name": name, "requests_per_minute": requests, "tokens_per_minute": tokens}
    if scope:
        body["scopes"] = scope
    if expires:
        body["expires_s"] = _seconds(expires)
    made = _call("POST", "/network/keys", body)
    if out.json:
        out.document(made)
        return
    out.line(made["key"])
    out.note("This key is not shown again. Clients send it as Authorization: Bearer …")


@keys.command("list", cls=Command)
def list_keys(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List the keys, without what makes them good. For administrators.

    \b
    Examples:
      ai-assistant api key list
    """
    out: Output = context.obj
    rows = _call("GET", "/network/keys")["data"]
    if out.json:
        out.document(rows)
        return
    out.table(
        ("id", "name", "scopes", "made", "expires", "requests/min", "tokens/min"),
        [
            (
                row["id"],
                row["name"],
                ",".join(row["scopes"]),
                _day(row["created"]),
                _day(row["expires"]) if row["expires"] else "never",
                str(row["requests_per_minute"] or "-"),
                str(row["tokens_per_minute"] or "-"),
            )
            for row in rows
        ],
    )


@keys.command("remove", cls=Command)
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="KEY", help="Its name, or its id.")],
    yes: Yes = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove a key; it is refused from then on. For administrators.

    \b
    Examples:
      ai-assistant api key remove laptop
    """
    from urllib.parse import quote

    out: Output = context.obj
    confirm(out, f"Remove the key {name}?", yes)
    removed = _call("DELETE", f"/network/keys/{quote(name, safe='')}")
    if out.json:
        out.document(removed)
    else:
        out.line(f"removed {removed['name']}")


def _literal(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError as error:
        raise usage_error(f"{address!r} is no IP address") from error
    return f"[{found}]" if found.version == 6 else str(found)


def _seconds(text: str) -> int:
    found = _DURATION.fullmatch(text)
    if found is None or not int(found[1]):
        raise usage_error(f"{text!r} is no time such as 30m, 12h or 90d")
    return int(found[1]) * _UNITS_S[found[2]]


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _listen(root: Path, listen: str) -> None:
    folder = root / f"etc/systemd/system/{UNIT}.d"
    folder.mkdir(parents=True, exist_ok=True)
    # The empty one first: the setting is a list.
    (folder / "10-listen.conf").write_text(f"[Socket]\nListenStream=\nListenStream={listen}\n")


def _install_certificate(root: Path, certificate: Path, private_key: Path) -> None:
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key, password=_no_password)
        contents = [("cert", certificate.read_bytes()), ("key", private_key.read_bytes())]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidArgument(
            f"{certificate} and {private_key} cannot be used: {why}",
            hint="PEM files that belong together, without a password",
        ) from error
    folder = root / "etc/credstore"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for kind, data in contents:
        partial = folder / f".ai-assistant.tls.{kind}"
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
        partial.replace(folder / f"ai-assistant.tls.{kind}")


def _no_password() -> str:
    raise ValueError("the key has a password")


def _settled(enabled: bool) -> Any:
    """The state once the daemon is back."""
    end = time.monotonic() + _WAIT_S
    while True:
        try:
            state = _call("GET", "/network")
            if state["enabled"] == enabled:
                return state
            raise InternalError(
                f"the daemon says that the network API is {'on' if state['enabled'] else 'off'}",
                hint=f"see systemctl status {UNIT}",
            )
        except ServiceUnavailable:
            if time.monotonic() > end:
                raise
        time.sleep(0.5)


def _show(out: Output, state: Mapping[str, Any]) -> None:
    if out.json:
        out.document(state)
        return
    if not state["enabled"]:
        out.fields([("network API", "off"), ("keys", str(state["keys"]))])
        return
    certificate = state["certificate"] or {}
    rows = [("network API", f"on: {', '.join(state['listening'])}" if not state["problem"] else "not served")]
    if state["problem"]:
        rows.append(("problem", state["problem"]))
    if certificate:
        rows += [
            ("certificate", f"{certificate['source']}, until {_day(certificate['expires'])}"),
            ("fingerprint", certificate["fingerprint_sha256"]),
            ("names", ", ".join(certificate["names"])),
        ]
    out.fields([*rows, ("keys", str(state["keys"]))])
    if state["problem"]:
        raise AIAssistantError(f"the network API is not served: {state['problem']}")
