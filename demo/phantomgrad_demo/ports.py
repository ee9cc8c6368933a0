"""A port to listen on."""

from __future__ import annotations

import errno
import os
import socket

FIRST_PORT = 7860
_TRIES = 100


def claim_port(host: str, port: int | None) -> int:
    """A free port of `host`: the one given, any if 0, the first free one from 7860 on if None.

    Raises `OSError` with one line that says what to do.
    """
    if port is not None:
        return _bound_port(host, port)
    for candidate in range(FIRST_PORT, FIRST_PORT + _TRIES):
        try:
            return _bound_port(host, candidate)
        except PortInUseError:
            continue
    raise PortInUseError(f"ports {FIRST_PORT} to {FIRST_PORT + _TRIES - 1} of {host} are all in use; give another")


class PortInUseError(OSError):
    """Another program listens on this port."""


def _bound_port(host: str, port: int) -> int:
    """Listen on the port for a moment; where that works, so will the server."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OSError(f"there is no address {host} on this machine") from error
    with socket.socket(family, kind, protocol) as probe:
        if os.name == "posix":  # elsewhere it would let two programs share the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(f"port {port} of {host} is in use; stop what uses it or give another") from error
            raise OSError(f"cannot listen on port {port} of {host}: {error.strerror}") from error
        return probe.getsockname()[1]
