"""Refuses the network to any Python that has this folder on PYTHONPATH, and writes every attempt
down.

Used by the notebook tests. Kernels talk to Jupyter on this machine, so local addresses stay open.
"""

import os
import socket

_LOCAL = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "", None}
_connect, _connect_ex, _getaddrinfo = (
    socket.socket.connect,
    socket.socket.connect_ex,
    socket.getaddrinfo,
)


def _refuse(what):
    log = os.environ.get("LENSLAB_NETWORK_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as handle:
            handle.write(f"{what}\n")
    raise OSError(f"the network is refused in this run: {what}")


def _check(sock, address):
    if sock.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL:
        _refuse(f"{address[0]}:{address[1]}")


def connect(self, address):
    _check(self, address)
    return _connect(self, address)


def connect_ex(self, address):
    _check(self, address)
    return _connect_ex(self, address)


def getaddrinfo(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    if name not in _LOCAL:
        _refuse(str(name))
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = (
    connect,
    connect_ex,
    getaddrinfo,
)
