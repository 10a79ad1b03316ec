"""Both ends of TCP connections whose owner and losses are known.

    talk.py sink PORT                   accepts for ever, reads all that comes
    talk.py fetch ADDRESS PORT N        makes N connections, reads each to its end

and the ones under test, which begin when a byte comes on standard input, send BYTES to each peer
in pieces of PIECE bytes, wait until all of it is acknowledged, and print for each socket, by its
local port: who sent (`owner.PORT`, `tid.PORT`) and TCP_INFO's count of segments sent once more
(`segs.PORT`).

    talk.py connect ADDRESS PORT BYTES PIECE         one socket
    talk.py earlier ADDRESS PORT BYTES PIECE         the same, connected before the byte came
    talk.py shared ADDRESS PORT BYTES PIECE          the same, and a child sends on it
    talk.py threads ADDRESS PORT BYTES PIECE         two threads, a socket each
    talk.py passed ADDRESS PORT BYTES PIECE          connected here, sent by a child (SCM_RIGHTS)
    talk.py accept ADDRESS PORT BYTES PIECE          one accepted socket
    talk.py workers ADDRESS PORT BYTES PIECE         three processes accept from one listener
    talk.py reuseport ADDRESS PORT BYTES PIECE       three processes, a listener each
"""

import array
import contextlib
import fcntl
import os
import socket
import struct
import sys
import termios
import threading
import time

WORKERS = 3
TOTAL_RETRANS_AT = 100  # in struct tcp_info: include/uapi/linux/tcp.h


def family_of(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def sink(port):
    with socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
    ) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=drain, args=(connection,), daemon=True).start()


def drain(connection):
    with connection, contextlib.suppress(OSError):
        while connection.recv(1 << 20):
            pass


def fetch(address, port, count):
    peers = []
    for _ in range(count):
        while True:
            try:
                peers.append(socket.create_connection((address, port)))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    readers = [threading.Thread(target=drain, args=(peer,)) for peer in peers]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()


def send(connection, size, piece):
    """Send and say who did; one write for all lines, so that processes do not mix theirs."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, sent = bytes(piece), 0
    while sent < size:
        connection.sendall(data)
        sent += piece
    waiting = array.array("i", [1])
    while waiting[0]:
        time.sleep(0.002)
        fcntl.ioctl(connection, termios.TIOCOUTQ, waiting)
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (segs,) = struct.unpack_from("I", info, TOTAL_RETRANS_AT)
    port = connection.getsockname()[1], connection.getpeername()[1]
    name = "-".join(map(str, port))
    text = f"owner.{name} {os.getpid()}\ntid.{name} {threading.get_native_id()}\n"
    os.write(1, f"{text}segs.{name} {segs}\n".encode())
    connection.close()


def ready():
    os.read(0, 1)


def listen(address, port):
    listener = socket.socket(family_of(address))
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
    listener.bind((address, port))
    listener.listen(64)
    return listener


def in_children(work):
    for _ in range(WORKERS):
        if not os.fork():
            work()
            os._exit(0)
    for _ in range(WORKERS):
        os.wait()


def connect_mode(address, port, *how):
    ready()
    send(socket.create_connection((address, port)), *how)


def earlier_mode(address, port, *how):
    connection = socket.create_connection((address, port))
    ready()
    send(connection, *how)


def shared_mode(address, port, *how):
    connection = socket.create_connection((address, port))
    if not os.fork():
        ready()
        send(connection, *how)
        os._exit(0)
    os.wait()


def threads_mode(address, port, *how):
    ready()
    both = [socket.create_connection((address, port)) for _ in range(2)]
    threads = [threading.Thread(target=send, args=(each, *how)) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def passed_mode(address, port, *how):
    ready()
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
        send(socket.socket(fileno=fd), *how)
        os._exit(0)
    connection = socket.create_connection((address, port))
    connection.sendall(b"mine")
    socket.send_fds(ours, [b"x"], [connection.fileno()])
    connection.close()
    os.wait()


def accept_mode(address, port, *how):
    ready()
    send(listen(address, port).accept()[0], *how)


def workers_mode(address, port, *how):
    ready()
    listener = listen(address, port)
    in_children(lambda: send(listener.accept()[0], *how))


def reuseport_mode(address, port, *how):
    ready()
    # The kernel chooses among the listeners: each takes what comes to it, all of it together.
    listeners = [listen(address, port) for _ in range(WORKERS)]

    def work(mine):
        mine.settimeout(2)
        with contextlib.suppress(TimeoutError):
            while True:
                connection, _ = mine.accept()
                connection.settimeout(None)
                send(connection, *how)

    for mine in listeners:
        if not os.fork():
            for other in listeners:
                if other is not mine:
                    other.close()
            work(mine)
            os._exit(0)
    for mine in listeners:
        mine.close()
    for _ in listeners:
        os.wait()


def main(mode, *rest):
    if mode == "sink":
        sink(int(rest[0]))
    elif mode == "fetch":
        fetch(rest[0], int(rest[1]), int(rest[2]))
    else:
        globals()[f"{mode}_mode"](rest[0], *map(int, rest[1:]))


main(*sys.argv[1:])
