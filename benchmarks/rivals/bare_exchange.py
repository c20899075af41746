"""The floor: takes a message, answers as many bytes as it asks for, and nothing else.

Started as `bare_exchange.py CORE tcp|PATH`; prints the port or the path. A message begins with its
own length and that of its answer (LENGTHS).
"""

import os
import socket
import struct
import sys

LENGTHS = struct.Struct("<II")
LONGEST = 1 << 20


def listen(address: str) -> socket.socket:
    if address == "tcp":
        return socket.create_server(("127.0.0.1", 0))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    return listener


def answer(connection: socket.socket) -> None:
    if connection.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer, zeros = memoryview(bytearray(LONGEST)), memoryview(bytes(LONGEST))
    got = 0
    while count := connection.recv_into(buffer[got:]):
        got += count
        there, back = LENGTHS.unpack_from(buffer)
        if got == there:
            connection.sendall(zeros[:back])
            got = 0


def main() -> None:
    core, address = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    with listen(address) as listener:
        print(listener.getsockname()[1] if address == "tcp" else address, flush=True)
        answer(listener.accept()[0])


if __name__ == "__main__":
    main()
