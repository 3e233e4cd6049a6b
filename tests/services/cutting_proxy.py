#!/usr/bin/env python3
"""A TCP proxy that damages HTTP answers or requests, to test failures in the middle of a stream.

Bytes are counted per request or answer, headers included, so short exchanges on the same connection pass.
Prints `ready http://127.0.0.1:PORT`, then one line for each thing it damaged.
"""
import argparse, asyncio, signal

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("upstream", help="host:port or http://host:port")
parser.add_argument("--port", type=int, default=0)
how = parser.add_mutually_exclusive_group(required=True)
how.add_argument("--cut-after", type=int, metavar="N", help="close the connection after N bytes of an answer")
how.add_argument("--corrupt-at", type=int, metavar="N", help="invert byte N of an answer")
how.add_argument("--stall-after", type=int, metavar="N", help="send nothing more after N bytes of an answer")
how.add_argument("--end-after", type=int, metavar="N", help="end the chunked answer properly at the first chunk "
                 "end after N bytes: valid HTTP that lacks rows; only a count can tell")
how.add_argument("--cut-request-after", type=int, metavar="N", help="close the connection after N bytes of a request")
parser.add_argument("--match", default="", help="damage only where the request's first bytes contain this text")
parser.add_argument("--times", type=int, default=-1, help="damage only so many, so that a retry succeeds")
args = parser.parse_args()
left = args.times


def take(what):
    global left
    if left == 0:
        return False
    left -= 1
    print(what, flush=True)
    return True


async def chunks(reader):
    """One answer: its head, then its chunks, each whole with its framing."""
    head = b"HTTP/1.1 100"
    while head.startswith(b"HTTP/1.1 100"):
        head = await reader.readuntil(b"\r\n\r\n")
        yield head
    size = 1
    while size:
        line = await reader.readline()
        size = int(line, 16)
        yield line + await reader.readexactly(size + 2)


async def serve(client, client_out):
    host, _, port = args.upstream.removeprefix("http://").rstrip("/").rpartition(":")
    server, server_out = await asyncio.open_connection(host, int(port), limit=1 << 24)
    head = b""         # the first bytes of the running request
    sent = got = 0     # its bytes, and those of its answer

    def close():
        client_out.transport.abort()
        server_out.transport.abort()

    def matches():
        return args.match.encode() in head

    async def upload():
        nonlocal head, sent, got
        while data := await client.read(1 << 16):
            if got:
                head, sent, got = b"", 0, 0
            head = (head + data)[:1 << 16]
            end = args.cut_request_after
            if end is not None and sent + len(data) > end and matches() and take(f"cut a request after {end} bytes"):
                server_out.write(data[:max(0, end - sent)])
                await server_out.drain()
                server_out.close()
                client_out.transport.abort()
                return
            sent += len(data)
            server_out.write(data)
            await server_out.drain()
        server_out.write_eof()

    async def download_chunks():
        nonlocal got
        while True:
            total = 0
            async for data in chunks(server):
                if total >= args.end_after and matches() and take(f"ended an answer after {total} bytes"):
                    client_out.write(b"0\r\n\r\n")
                    client_out.close()
                    return server_out.transport.abort()
                got = total = total + len(data)
                client_out.write(data)
                await client_out.drain()

    async def download():
        nonlocal got
        while True:
            data = await server.read(1 << 16)
            if not data:
                return client_out.close()
            first, got = got, got + len(data)
            for at in (args.cut_after, args.stall_after):
                if at is not None and got > at and matches() and take(f"cut or stalled an answer after {at} bytes"):
                    client_out.write(data[:max(0, at - first)])
                    await client_out.drain()
                    if args.stall_after is not None:
                        await asyncio.sleep(3600)
                    client_out.close()
                    return server_out.transport.abort()
            at = args.corrupt_at
            if at is not None and first <= at < got and matches() and take(f"inverted byte {at} of an answer"):
                data = bytearray(data)
                data[at - first] ^= 0xFF
            client_out.write(data)
            await client_out.drain()

    tasks = [asyncio.ensure_future(upload()), asyncio.ensure_future(download() if args.end_after is None else download_chunks())]
    try:
        await asyncio.gather(*tasks)
    except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, ValueError):
        pass
    finally:
        for task in tasks:
            task.cancel()
        close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", args.port)
    print(f"ready http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    await stop.wait()


asyncio.run(main())
