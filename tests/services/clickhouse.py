#!/usr/bin/env python3
"""ClickHouse's HTTP interface over the real ClickHouse engine (the chdb-core wheel).

Every query runs in the engine itself; this file only speaks HTTP. Answers are written by the engine
into a pipe (INTO OUTFILE), so they stream with bounded memory and can fail in the middle exactly as
a server's do: the first MiB is held back, an error after it arrives inside the body.
"""
import argparse, fcntl, gzip, hmac, json, os, re, select, signal, socket, struct, sys, tempfile
import threading, time, uuid, zlib
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import choice
from urllib.parse import parse_qsl, urlsplit

import lz4.block, lz4.frame
from chdb import _chdb
from clickhouse_cityhash.cityhash import CityHash128

MIB = 1 << 20
# As in src/Server/HTTP/exceptionCodeToHTTPStatus.cpp; every other code is 500.
STATUS = {194: 401, 158: 413, 48: 501, 381: 411, 159: 408, 415: 415}
STATUS |= dict.fromkeys((192, 193, 516, 512, 497), 403) | dict.fromkeys((209, 439, 76), 503)
STATUS |= dict.fromkeys((36, 427, 6, 25, 26, 38, 41, 72, 441, 446, 27, 376, 15, 44, 63, 65, 8, 167,
                         168, 223, 62, 117, 53, 321), 400)
STATUS |= dict.fromkeys((60, 46, 47, 50, 56, 81, 115, 74, 63, 73, 336, 78, 511), 404)
STATUS[63] = 404
# URL parameters that are not settings.
RESERVED = {"query", "database", "default_format", "query_id", "session_id", "session_timeout",
            "session_check", "close_session", "compress", "decompress", "user", "password", "role",
            "quota_key", "stacktrace", "wait_end_of_query", "buffer_size", "client_protocol_version",
            "http_wait_end_of_query", "http_response_buffer_size", "enable_http_compression"}
TYPES = {"JSON": "application/json; charset=UTF-8", "JSONEachRow": "application/x-ndjson; charset=UTF-8",
         "CSV": "text/csv; charset=UTF-8; header=absent", "CSVWithNames": "text/csv; charset=UTF-8; header=present",
         "ArrowStream": "application/vnd.apache.arrow.stream", "Arrow": "application/vnd.apache.arrow.file",
         "Parquet": "application/vnd.apache.parquet"}
TOKEN = re.compile(
    rb"""\s+|--[^\n]*|\#[ !][^\n]*|/\*.*?\*/|'(?:[^'\\]|\\.|'')*'|`(?:[^`\\]|\\.|``)*`"""
    rb"""|"(?:[^"\\]|\\.|"")*"|(\$\w*\$).*?\1|(?P<word>\w+)|(?P<other>.)""", re.S)


class Failure(Exception):
    """An error as the engine reports it: `Code: N. DB::Exception: …`."""

    def __init__(self, code, text=None):
        if text is None:  # an exception of the engine
            text = str(code)
            found = re.search(r"Code: (\d+)\. DB::", text)
            code, text = (int(found[1]), text[found.start():]) if found else (1002, "Code: 1002. DB::Exception: " + text)
        else:
            text = f"Code: {code}. DB::Exception: {text}"
        self.code = code
        self.text = re.sub(r" \(version [\d.]+\)\.?\s*$", "", text) + f" (version {Engine.version} (official build))\n"


class Cut(Exception):
    """The client went away."""


def quote(text):
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def words(sql):
    """Top-level words and punctuation of a statement, as (start, end, lower-case text)."""
    depth = 0
    for m in TOKEN.finditer(sql):
        if m.lastgroup not in ("word", "other"):
            continue
        text = m[0].lower()
        depth -= text == b")"
        if depth == 0:
            yield m.start(), m.end(), text
        depth += text == b"("


def insert_parts(sql):
    """An INSERT that carries data: (statement, format or None, data that follows it). Else None."""
    found = list_words = []
    for i, word in enumerate(words(sql)):
        list_words.append(word)
        if i == 0 and word[2] != b"insert":
            return None
        if word[2] == b"values":
            return sql[:word[0]], "Values", sql[word[1]:]
        if len(found) > 1 and found[-2][2] == b"format":
            # Data starts after blanks and at most one line end, also when it is binary.
            return sql[:found[-2][0]], word[2] and sql[word[0]:word[1]].decode(), re.sub(rb"\A[ \t\f]*\r?\n?", b"", sql[word[1]:])
        if word[2] in (b"select", b"with", b"infile") and b"input" not in sql.lower():
            return None
    return (sql, None, b"") if found else None


class Engine:
    version = ""
    path = None
    base = None      # keeps the engine running while no request does
    sessions = {}    # id -> [connection, lock, time of expiry]
    lock = threading.Lock()

    @classmethod
    def start(cls, path):
        cls.path, cls.base = path, _chdb.connect(path)
        cls.version = cls.base.query("SELECT version()", "TSVRaw").bytes().decode().strip()

    @classmethod
    def connect(cls):
        conn = _chdb.connect(cls.path)
        # The embedded engine differs from a server in these; the rest of system.settings is the same.
        conn.query("SET implicit_select = 0, allow_introspection_functions = 0, storage_file_read_method = 'pread'", "TSV")
        return conn


def run(conn, sql, fmt="TSV"):
    try:
        result = conn.query(sql, fmt)
    except RuntimeError as e:
        raise Failure(e) from None
    if result.has_error():
        raise Failure(result.error_message())
    return result


class Body:
    """The request's body: chunked or counted, decoded; read() gives b"" at its true end only."""

    def __init__(self, handler, native):
        self.file, headers = handler.rfile, handler.headers
        self.chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self.left = 0 if self.chunked else int(headers.get("Content-Length") or 0)
        self.done, self.native, self.buffer = not self.chunked and not self.left, native, b""
        encoding = headers.get("Content-Encoding", "").lower()
        self.decoder = {"gzip": lambda: zlib.decompressobj(31), "deflate": zlib.decompressobj,
                        "lz4": lz4.frame.LZ4FrameDecompressor}.get(encoding, lambda: None)()

    def raw(self):
        if self.chunked and not self.left and not self.done:
            try:
                self.left = int(self.file.readline(1024).split(b";")[0], 16)
            except ValueError:
                raise Cut from None
            if not self.left:
                while self.file.readline(65536).strip():
                    pass
                self.done = True
        if self.done:
            return b""
        data = self.file.read1(min(self.left, MIB))
        if not data:
            raise Cut
        self.left -= len(data)
        if not self.left:
            if self.chunked:
                self.file.readline(8)
            else:
                self.done = True
        return data

    def plain(self):
        while data := self.raw():
            if not self.decoder:
                return data
            if data := self.decoder.decompress(data):
                return data
        return b""

    def exactly(self, size):
        while len(self.buffer) < size:
            data = self.plain()
            if not data:
                break
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def read(self):
        if not self.native:
            data, self.buffer = self.buffer, b""
            return data or self.plain()
        # A native block: checksum (16), method (1), sizes with this header and without (4 + 4), data.
        head = self.exactly(25)
        if not head:
            return b""
        if len(head) < 25:
            raise Failure(33, "Cannot read all data: the compressed stream ends inside a block. (CANNOT_READ_ALL_DATA)")
        method, packed, size = struct.unpack("<BII", head[16:])
        data = self.exactly(packed - 9)
        if len(data) < packed - 9:
            raise Failure(33, "Cannot read all data: the compressed stream ends inside a block. (CANNOT_READ_ALL_DATA)")
        if checksum(head[16:] + data) != head[:16]:
            raise Failure(40, "Checksum doesn't match: corrupted data. (CHECKSUM_DOESNT_MATCH)")
        if method == 0x02:
            return data
        if method != 0x82:
            raise Failure(89, f"Unknown compression method {method:#x}: this front reads LZ4 and NONE. (UNKNOWN_COMPRESSION_METHOD)")
        return lz4.block.decompress(data, uncompressed_size=size)

    def drain(self):
        while self.raw():
            pass


def checksum(data):
    value = CityHash128(data)
    return struct.pack("<QQ", value >> 64, value & 0xFFFFFFFFFFFFFFFF)


class Native:
    """compress=1: LZ4 blocks with checksums."""

    def compress(self, data):
        blocks = []
        for i in range(0, len(data), MIB):
            part = data[i:i + MIB]
            packed = lz4.block.compress(part, store_size=False)
            packed = struct.pack("<BII", 0x82, len(packed) + 9, len(part)) + packed
            blocks.append(checksum(packed) + packed)
        return b"".join(blocks)

    def flush(self, end):
        return b""


class Lz4Frame:
    def __init__(self):
        self.inner = lz4.frame.LZ4FrameCompressor(block_size=lz4.frame.BLOCKSIZE_MAX256KB, auto_flush=True)
        self.begun = b""

    def compress(self, data):
        head = b"" if self.begun else self.inner.begin()
        self.begun = True
        return head + self.inner.compress(data)

    def flush(self, end):
        return (b"" if self.begun else self.compress(b"")) + self.inner.flush() if end else b""


class Zlib:
    def __init__(self, bits):
        self.inner = zlib.compressobj(3, zlib.DEFLATED, bits)

    def compress(self, data):
        return self.inner.compress(data)

    def flush(self, end):
        return self.inner.flush(zlib.Z_FINISH if end else zlib.Z_SYNC_FLUSH)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 600
    password = None

    def log_message(self, *args):
        pass

    # --- answering ---

    def begin(self, status, headers=()):
        self.begun = True
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        chunked = self.request_version != "HTTP/1.0"
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self.send_header("Connection", "close" if self.close_connection else "Keep-Alive")
        for name, value in (*self.common, *headers):
            self.send_header(name, value)
        self.end_headers()
        return chunked

    def write(self, data):
        if data:
            chunked = self.request_version != "HTTP/1.0"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)

    def end(self):
        if self.request_version != "HTTP/1.0":
            self.wfile.write(b"0\r\n\r\n")

    def simple(self, status, text, headers=()):
        self.begin(status, headers)
        self.write(text.encode())
        self.end()

    def do_GET(self):
        self.handle_request(False)

    def do_POST(self):
        self.handle_request(True)

    def handle_request(self, post):
        self.begun, self.common = False, [("X-ClickHouse-Server-Display-Name", socket.gethostname())]
        url = urlsplit(self.path)
        params = dict(parse_qsl(url.query, keep_blank_values=True))
        body = Body(self, params.get("decompress") == "1")
        try:
            try:
                if url.path != "/" or not (post or url.query):
                    known = url.path in ("/", "/ping", "/replicas_status")
                    self.simple(200 if known else 404, "Ok.\n" if known else f"There is no handle {url.path}\n")
                else:
                    self.authenticate(params)
                    self.query(params, body, post)
            except Failure as failure:
                if self.begun:
                    raise
                # A server reads the rest of the body first, or the client would see a reset instead.
                body.drain()
                self.simple(STATUS.get(failure.code, 500), failure.text,
                            [("Content-Type", "text/plain; charset=UTF-8"),
                             ("X-ClickHouse-Exception-Code", str(failure.code))])
            else:
                body.drain()
        except (Cut, OSError, Failure):
            self.close_connection = True

    def authenticate(self, params):
        if self.password is None:
            return
        given = self.headers.get("X-ClickHouse-Key", params.get("password", ""))
        if (basic := self.headers.get("Authorization", "")).startswith("Basic "):
            given = b64decode(basic[6:]).decode().partition(":")[2]
        if not hmac.compare_digest(given.encode(), self.password.encode()):
            user = self.headers.get("X-ClickHouse-User", params.get("user", "default"))
            raise Failure(516, f"{user}: Authentication failed: password is incorrect, or there is no user with such name. (AUTHENTICATION_FAILED)")

    # --- one query ---

    def query(self, params, body, post):
        settings = {k: v for k, v in params.items() if k not in RESERVED}
        head = params.get("query", "").encode()
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("multipart/form-data"):
            fields = form(kind, body)
            head += fields.pop("query", b"")
            settings |= {k: v.decode() for k, v in fields.items() if k not in RESERVED}
        elif not insert_parts(head):
            # The statement itself is in the body, perhaps with data behind it.
            head += b"\n" if head else b""
            while len(head) < MIB // 4 and (data := body.read()):
                head += data
        insert = insert_parts(head)
        if not insert:
            while data := body.read():
                head += data
        if not head.strip():
            raise Failure(62, "Syntax error: empty query. (SYNTAX_ERROR)")
        database = params.get("database") or self.headers.get("X-ClickHouse-Database")
        self.common += [("X-ClickHouse-Query-Id", params.get("query_id") or str(uuid.uuid4())),
                        ("X-ClickHouse-Timezone", "UTC")]
        with Lease(params) as conn:
            undo = []
            try:
                if database:
                    run(conn, "USE `" + database.replace("`", "\\`") + "`")
                for name, value in settings.items():
                    if params.get("session_id") and not name.startswith("param_"):
                        # Settings in the URL are for this query, not for the session.
                        old = run(conn, f"SELECT value FROM system.settings WHERE name = {quote(name)}", "RawBLOB").bytes()
                        undo.append(f"SET `{name}` = {quote(bytes(old or b'').decode())}")
                    if not re.fullmatch(r"\w+", name):
                        raise Failure(115, f"Unknown setting '{name}'. (UNKNOWN_SETTING)")
                    run(conn, f"SET `{name}` = {quote(value)}")
                fmt = params.get("default_format") or self.headers.get("X-ClickHouse-Format")
                if insert:
                    self.insert(conn, insert, fmt, body, post)
                else:
                    self.select(conn, head, fmt or "TabSeparated", params, post)
            finally:
                for sql in undo:
                    run(conn, sql)

    def insert(self, conn, parts, fmt, body, post):
        sql, data, rows = parts[0].decode(), parts[2], 0
        fmt = parts[1] or fmt or "Values"
        started = time.monotonic()
        if not post:
            raise Failure(164, "Cannot execute query in readonly mode. For queries over HTTP, method GET implies readonly. (READONLY)")
        if fmt == "Values" and not body.native and body.done:
            # Expressions and parameters in VALUES are the statement's, not the stream's.
            if data.strip():
                rows = run(conn, f"{sql} VALUES {data.decode()}").rows_written()
        else:
            try:
                stream = conn.send_insert(sql, fmt)
                try:
                    if data:
                        conn.insert_append(stream, data)
                    while data := body.read():
                        conn.insert_append(stream, data)
                except BaseException:
                    conn.insert_cancel(stream)
                    raise
                rows = conn.insert_done(stream).rows_written()
            except RuntimeError as e:
                raise Failure(e) from None
        self.simple(200, "", [summary(started, written=rows)])

    def select(self, conn, sql, fmt, params, post):
        started = time.monotonic()
        plan = conn.classify_query(sql.decode())
        if plan["statement_count"] > 1:
            raise Failure(62, "Syntax error (Multi-statements are not allowed). (SYNTAX_ERROR)")
        kind = plan["query_class"].name
        if kind == "MUTATING" and not post:
            raise Failure(164, "Cannot execute query in readonly mode. For queries over HTTP, method GET implies readonly. (READONLY)")
        tail = list(words(sql))
        while tail and tail[-1][2] == b";":
            sql = sql[:tail.pop()[0]]
        cut = len(sql)
        for a, b, after in zip(tail, tail[1:], [*(t[2] for t in tail[2:]), b""]):
            if a[2] == b"format" and re.fullmatch(rb"[a-z]\w*", b[2]) and after in (b"", b"settings"):
                cut, fmt = a[0], sql[b[0]:b[1]].decode()
        text, rest = sql[:cut].decode(), sql[cut:].decode()
        self.common += [("X-ClickHouse-Format", fmt), ("Content-Type", TYPES.get(fmt) or
                        ("text/tab-separated-values; charset=UTF-8" if fmt.startswith("T") else "application/octet-stream"))]
        encode, encoding = None, []
        if params.get("compress") == "1":
            encode = Native()
        elif params.get("enable_http_compression") != "0":
            accepted = [e.split(";")[0].strip() for e in self.headers.get("Accept-Encoding", "").lower().split(",")]
            for name, make in (("lz4", Lz4Frame), ("gzip", lambda: Zlib(31)), ("deflate", lambda: Zlib(15))):
                if name in accepted:
                    encode, encoding = make(), [("Content-Encoding", name)]
                    break
        # One tag per answer, as servers since 25.11 send it: it marks an error inside the body.
        tag = "".join(choice("abcdefghijklmnopqrstuvwxyz") for _ in range(16))
        self.common += [*encoding, ("X-ClickHouse-Exception-Tag", tag)]
        wait = "1" in (params.get("wait_end_of_query"), params.get("http_wait_end_of_query"))

        if kind == "READ_ONLY":
            source = piped(conn, text, rest or f"FORMAT {fmt}")
        else:
            source = iter([run(conn, sql.decode(), fmt)])
        outcome = None
        pending = tempfile.SpooledTemporaryFile(64 * MIB) if wait else None
        held, sending = [], False

        def send(data):
            self.write(encode.compress(data) if encode and data else data)

        def start():
            nonlocal sending
            sending = True
            result = outcome
            self.begin(200, [summary(started, result)])

        try:
            for item in source:
                if not isinstance(item, bytes):
                    outcome = item
                    if kind != "READ_ONLY" and item.size():
                        held.append(bytes(item.bytes()))
                elif pending:
                    pending.write(item)
                elif sending:
                    send(item)
                else:
                    held.append(item)
                    if sum(map(len, held)) >= max(MIB, int(params.get("buffer_size") or 0)):
                        start()
                        send(b"".join(held))
            if not sending:
                start()
                if pending:
                    pending.seek(0)
                    while data := pending.read(MIB):
                        send(data)
                else:
                    send(b"".join(held))
            self.write(encode.flush(True) if encode else b"")
            self.end()
        except Failure as failure:
            if not sending:
                self.common = [h for h in self.common if h[0] not in ("Content-Type", "Content-Encoding")]
                raise
            text = failure.text.encode()
            send(b"\r\n__exception__\r\n%b\r\n%b%d %b\r\n__exception__\r\n" % (tag.encode(), text, len(text), tag.encode()))
            self.write(encode.flush(False) if encode else b"")
            # No last chunk: also clients that do not know the tag see that the answer is not whole.
            raise
        finally:
            source.close() if hasattr(source, "close") else None
