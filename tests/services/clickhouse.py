#!/usr/bin/env python3
"""ClickHouse's HTTP interface over the real ClickHouse engine (the chdb-core wheel).

Every statement runs in the engine; this file only speaks HTTP. The engine writes an answer into a pipe,
so answers stream with bounded memory and fail in the middle as a server's do: an error within the first
MiB becomes the HTTP status, a later one arrives inside the body and the body does not end properly.
"""
import argparse, fcntl, hmac, json, os, re, signal, socket, struct, tempfile, threading, time, uuid, zlib
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import choice
from urllib.parse import parse_qsl, urlsplit

import lz4.block, lz4.frame
from chdb import _chdb
from clickhouse_cityhash.cityhash import CityHash128

MIB = 1 << 20
# The same as in ClickHouse's exceptionCodeToHTTPStatus.cpp; all others are 500.
STATUS = {name: status for status, names in {
    400: """BAD_ARGUMENTS CANNOT_COMPILE_REGEXP CANNOT_PARSE_TEXT CANNOT_PARSE_ESCAPE_SEQUENCE
            CANNOT_PARSE_QUOTED_STRING CANNOT_PARSE_DATE CANNOT_PARSE_DATETIME CANNOT_PARSE_NUMBER
            CANNOT_PARSE_DOMAIN_VALUE_FROM_STRING CANNOT_PARSE_IPV4 CANNOT_PARSE_IPV6 CANNOT_PARSE_UUID
            CANNOT_PARSE_INPUT_ASSERTION_FAILED DUPLICATE_COLUMN ILLEGAL_COLUMN UNKNOWN_ELEMENT_IN_AST
            UNKNOWN_TYPE_OF_AST_NODE THERE_IS_NO_COLUMN TOO_DEEP_AST TOO_BIG_AST UNEXPECTED_AST_STRUCTURE
            SYNTAX_ERROR INCORRECT_DATA TYPE_MISMATCH VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE""",
    401: "REQUIRED_PASSWORD",
    403: "UNKNOWN_USER WRONG_PASSWORD AUTHENTICATION_FAILED SET_NON_GRANTED_ROLE ACCESS_DENIED",
    404: """UNKNOWN_TABLE UNKNOWN_FUNCTION UNKNOWN_IDENTIFIER UNKNOWN_TYPE UNKNOWN_STORAGE UNKNOWN_DATABASE
            UNKNOWN_SETTING UNKNOWN_DIRECTION_OF_SORTING UNKNOWN_AGGREGATE_FUNCTION UNKNOWN_FORMAT
            UNKNOWN_DATABASE_ENGINE UNKNOWN_TYPE_OF_QUERY UNKNOWN_ROLE""",
    408: "TIMEOUT_EXCEEDED", 413: "QUERY_IS_TOO_LARGE", 501: "NOT_IMPLEMENTED",
    503: "SOCKET_TIMEOUT CANNOT_OPEN_FILE CANNOT_SCHEDULE_TASK"}.items() for name in names.split()}
# URL parameters and form fields that are not settings of the engine.
RESERVED = set("""query database default_format query_id session_id session_timeout session_check close_session
    compress decompress user password role quota_key stacktrace wait_end_of_query http_wait_end_of_query
    buffer_size http_response_buffer_size enable_http_compression client_protocol_version""".split())
TOKEN = re.compile(
    rb"""\s+|--[^\n]*|\#[ !][^\n]*|/\*.*?\*/|'(?:[^'\\]|\\.|'')*'|`(?:[^`\\]|\\.|``)*`|"(?:[^"\\]|\\.|"")*\""""
    rb"""|(\$\w*\$).*?\1|(?P<word>\w+)|(?P<other>.)""", re.S)


class Failure(Exception):
    """An error as a server words it: `Code: N. DB::Exception: text. (NAME) (version …)`."""

    def __init__(self, code, text):
        self.code = code
        text = re.sub(r"( \(version [\d.]+\))?\.?\s*$", "", text) if text.startswith("Code: ") else \
            f"Code: {code}. DB::Exception: {text} ({Engine.names[code]})"
        self.text = f"{text} (version {Engine.version} (official build))\n"

    @staticmethod
    def of(error):
        text = str(error)
        found = re.search(r"Code: (\d+)\. DB::", text)
        return Failure(int(found[1]), text[found.start():]) if found else Failure(1002, text)


class Cut(Exception):
    """The client went away in the middle of its request."""


class Engine:
    path = base = version = timezone = None   # base keeps the engine running while no request does
    names = {}      # code -> name
    sessions = {}   # id -> [connection, busy, time of expiry]
    lock = threading.Lock()

    @classmethod
    def start(cls, path):
        cls.path, cls.base = path, _chdb.connect(path)
        ask = lambda sql: cls.base.query(sql, "TSVRaw").bytes().decode().strip()
        cls.version, cls.timezone = ask("SELECT version(), timezone()").split("\t")
        cls.names = dict(enumerate(ask("SELECT errorCodeToName(number) FROM numbers(2000)").split("\n")))

    @classmethod
    def connect(cls):
        conn = _chdb.connect(cls.path)
        # What the embedded engine sets unlike a server; everything else has a server's defaults.
        run(conn, "SET implicit_select = 0, allow_introspection_functions = 0, storage_file_read_method = 'pread'")
        return conn


def run(conn, sql, fmt="TSV"):
    try:
        return conn.query(sql, fmt)
    except RuntimeError as e:
        raise Failure.of(e) from None


class Lease:
    """A connection of its own for each request, or the session's."""

    def __init__(self, params):
        self.params, self.id = params, params.get("session_id")

    def __enter__(self):
        if not self.id:
            self.conn = Engine.connect()
            return self.conn
        with Engine.lock:
            for id, (conn, busy, expiry) in list(Engine.sessions.items()):
                if not busy and expiry < time.monotonic():
                    Engine.sessions.pop(id)[0].close()
            if self.id not in Engine.sessions:
                if self.params.get("session_check") == "1":
                    raise Failure(372, f"Session {self.id} not found.")
                Engine.sessions[self.id] = [Engine.connect(), False, 0]
            session = Engine.sessions[self.id]
            if session[1]:
                raise Failure(373, f"Session {self.id} is locked by a concurrent client.")
            session[1] = True
            self.conn = session[0]
            return self.conn

    def __exit__(self, *_):
        if not self.id:
            return self.conn.close()
        with Engine.lock:
            Engine.sessions[self.id][1:] = False, time.monotonic() + float(self.params.get("session_timeout", 60))
            if self.params.get("close_session") == "1":
                Engine.sessions.pop(self.id)[0].close()


def words(sql):
    """Words and punctuation outside of parentheses, as (start, end, lower-case bytes)."""
    depth = 0
    for m in TOKEN.finditer(sql):
        if m.lastgroup in ("word", "other"):
            depth -= m[0] == b")"
            if depth == 0:
                yield m.start(), m.end(), m[0].lower()
            depth += m[0] == b"("


def insert_parts(sql):
    """For an INSERT that takes data from the request: (statement, format, data behind it)."""
    before = (0, 0, b"")
    for i, word in enumerate(words(sql)):
        if i == 0 and word[2] != b"insert" or word[2] == b"infile":
            return None
        if before[2] == b"format":
            # Blanks and one line end separate the data; what follows may be binary.
            return sql[:before[0]], sql[word[0]:word[1]].decode(), re.sub(rb"\A[ \t\f]*\r?\n?", b"", sql[word[1]:])
        if word[2] == b"values":
            return sql[:word[0]], "Values", sql[word[1]:]
        if word[2] in (b"select", b"with") and not re.search(rb"\binput\s*\(", sql, re.I):
            return None
        before = word
    return None


def quote(text):
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def checksum(data):
    value = CityHash128(data)
    return struct.pack("<QQ", value >> 64, value & 0xFFFFFFFFFFFFFFFF)


class Body:
    """The request's body, counted or chunked, decoded. b"" means its proper end; a cut raises."""

    def __init__(self, handler, native):
        self.file, headers = handler.rfile, handler.headers
        self.chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self.left = 0 if self.chunked else int(headers.get("Content-Length") or 0)
        self.ended, self.native, self.buffer = not (self.chunked or self.left), native, b""
        make = {"gzip": lambda: zlib.decompressobj(31), "deflate": zlib.decompressobj,
                "lz4": lz4.frame.LZ4FrameDecompressor}.get(headers.get("Content-Encoding", "").lower())
        self.decoder = make and make()

    def raw(self):
        if self.chunked and not self.left and not self.ended:
            try:
                self.left = int(self.file.readline(1024).split(b";")[0], 16)
            except ValueError:
                raise Cut from None
            if not self.left:
                while self.file.readline(65536).strip():
                    pass
                self.ended = True
        if self.ended:
            return b""
        data = self.file.read1(min(self.left, MIB))
        if not data:
            raise Cut
        self.left -= len(data)
        if not self.left and self.chunked:
            self.file.readline(8)
        self.ended = not (self.left or self.chunked)
        return data

    def plain(self):
        while data := self.raw():
            if data := self.decoder.decompress(data) if self.decoder else data:
                return data
        return b""

    def exactly(self, size):
        while len(self.buffer) < size:
            data = self.plain()
            if not data:
                break
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        if data and len(data) < size:
            raise Failure(33, "Cannot read all data: the stream ends inside a compressed block.")
        return data

    def read(self):
        if not self.native:
            return self.plain()
        # A block: checksum of the rest (16), method (1), size with this header (4), size decompressed (4), data.
        head = self.exactly(25)
        if not head:
            return b""
        method, packed, size = struct.unpack("<BII", head[16:])
        if not 9 < packed <= 1 << 30:
            raise Failure(432, f"Unknown codec or damaged block: size {packed}.")
        data = self.exactly(packed - 9)
        if checksum(head[16:] + data) != head[:16]:
            raise Failure(40, "Checksum doesn't match: corrupted data.")
        if method not in (0x02, 0x82):
            raise Failure(89, f"Unknown compression method {method:#x}: here only LZ4 and NONE.")
        return lz4.block.decompress(data, uncompressed_size=size) if method == 0x82 else data

    def drain(self):
        while self.raw():
            pass


class Identity:
    name = None

    def pack(self, data):
        return data

    def end(self):
        return b""


class Native(Identity):
    """compress=1: LZ4 blocks with checksums."""

    def pack(self, data):
        out = []
        for i in range(0, len(data), MIB):
            part = data[i:i + MIB]
            block = lz4.block.compress(part, store_size=False)
            block = struct.pack("<BII", 0x82, len(block) + 9, len(part)) + block
            out += checksum(block), block
        return b"".join(out)


class Lz4(Identity):
    name = "lz4"

    def __init__(self):
        self.inner = lz4.frame.LZ4FrameCompressor(block_size=lz4.frame.BLOCKSIZE_MAX256KB, auto_flush=True)
        self.head = self.inner.begin()

    def pack(self, data):
        head, self.head = self.head, b""
        return head + self.inner.compress(data)

    def end(self):
        return self.head + self.inner.flush()


class Gzip(Identity):
    name = "gzip"

    def __init__(self):
        self.inner = zlib.compressobj(3, zlib.DEFLATED, 31)

    def pack(self, data):
        return self.inner.compress(data) + self.inner.flush(zlib.Z_SYNC_FLUSH)

    def end(self):
        return self.inner.flush()


def piped(conn, sql, tail):
    """The answer's bytes as the engine writes them, then its statistics; its error is raised at the end."""
    source, sink = os.pipe()
    fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, MIB)
    outcome, data = [], b""

    def work():
        try:
            outcome.append(run(conn, f"{sql}\nINTO OUTFILE '/dev/fd/{sink}' APPEND\n{tail}"))
        except Exception as e:
            outcome.append(e)
        finally:
            os.close(sink)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while data := os.read(source, MIB):
            yield data
    finally:
        os.close(source)
        if thread.is_alive() and data:
            # The reader left before the end; the engine would compute the rest for nobody.
            with Lease({}) as other:
                run(other, f"KILL QUERY WHERE query LIKE '%INTO OUTFILE \\'/dev/fd/{sink}\\' APPEND%' AND query NOT LIKE 'KILL%'")
        thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    yield outcome[0]


def form(kind, body):
    data = b""
    while part := body.read():
        data += part
    fields = {}
    for part in data.split(b"--" + re.search(r'boundary="?([^";]+)', kind)[1].encode())[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        fields[re.search(rb'name="([^"]*)"', head)[1].decode()] = value[:-2]
    return fields


def summary(started, result=None, written=0):
    get = lambda name: str(getattr(result, name)() if result else 0)
    return "X-ClickHouse-Summary", json.dumps({
        "read_rows": get("storage_rows_read"), "read_bytes": get("storage_bytes_read"),
        "written_rows": str(written) if written else get("rows_written"), "written_bytes": get("bytes_written"),
        "total_rows_to_read": "0", "result_rows": get("rows_read"), "result_bytes": get("bytes_read"),
        "elapsed_ns": str(int((time.monotonic() - started) * 1e9))}, separators=(",", ":"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    rbufsize = 1 << 16
    timeout = 3600
    password = None

    def log_message(self, *_):
        pass

    def begin(self, status, headers=()):
        self.begun = True
        self.chunked = self.request_version != "HTTP/1.0"
        self.close_connection |= not self.chunked
        self.send_response_only(status)
        for name, value in (("Date", self.date_time_string()), *self.common, *headers,
                            ("Connection", "close" if self.close_connection else "Keep-Alive"),
                            *[("Transfer-Encoding", "chunked")][:self.chunked]):
            self.send_header(name, value)
        self.end_headers()

    def write(self, data):
        if data:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def finish_answer(self):
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def answer(self, status, text, headers=()):
        self.begin(status, headers)
        self.write(text.encode())
        self.finish_answer()

    def do_GET(self):
        self.serve(False)

    def do_POST(self):
        self.serve(True)

    def serve(self, post):
        self.begun, self.common = False, [("X-ClickHouse-Server-Display-Name", socket.gethostname())]
        url = urlsplit(self.path)
        params = dict(parse_qsl(url.query, keep_blank_values=True))
        body = Body(self, params.get("decompress") == "1")
        try:
            try:
                if url.path in ("/ping", "/replicas_status") or url.path == "/" and not (post or url.query):
                    self.answer(200, "Ok.\n")
                elif url.path != "/":
                    self.answer(404, f"There is no handle {url.path}\n")
                else:
                    self.authenticate(params)
                    self.query(params, body, post)
            except Failure as e:
                if self.begun:
                    raise
                # Read the rest of the request first: otherwise the client sees a reset, not the error.
                body.drain()
                self.answer(STATUS.get(Engine.names.get(e.code), 500), e.text,
                            [("X-ClickHouse-Exception-Code", e.code), ("Content-Type", "text/plain; charset=UTF-8")])
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
            raise Failure(516, f"{user}: Authentication failed: password is incorrect, or there is no user with such name.")

    def query(self, params, body, post):
        settings = {k: v for k, v in params.items() if k not in RESERVED}
        sql = params.get("query", "").encode()
        insert = insert_parts(sql)
        if (kind := self.headers.get("Content-Type", "")).startswith("multipart/form-data"):
            fields = form(kind, body)
            sql += fields.pop("query", b"")
            settings |= {k: v.decode() for k, v in fields.items() if k not in RESERVED}
            insert = insert_parts(sql)
        elif insert:
            if insert[2]:
                insert = *insert[:2], insert[2] + b"\n"
        else:
            # The statement, or the rest of it, is in the body, perhaps with data behind it.
            sql += b"\n" if sql else b""
            while data := body.read():
                sql += data
                if len(sql) > MIB // 4 and (insert := insert_parts(sql)):
                    break
            insert = insert or insert_parts(sql)
        if not sql.strip():
            raise Failure(62, "Syntax error: empty query.")
        self.common += [("X-ClickHouse-Query-Id", params.get("query_id") or str(uuid.uuid4())),
                        ("X-ClickHouse-Timezone", Engine.timezone)]
        with Lease(params) as conn:
            undo = []
            try:
                if database := params.get("database") or self.headers.get("X-ClickHouse-Database"):
                    run(conn, "USE `" + database.replace("\\", "\\\\").replace("`", "\\`") + "`")
                for name, value in settings.items():
                    if not re.fullmatch(r"\w+", name):
                        raise Failure(115, f"Unknown setting '{name}'.")
                    old = None
                    if params.get("session_id") and not name.startswith("param_"):
                        # Settings in the URL are the query's, not the session's.
                        old = run(conn, f"SELECT value FROM system.settings WHERE name = {quote(name)}", "RawBLOB").bytes()
                    run(conn, f"SET {name} = {quote(value)}")
                    if old is not None:
                        undo.append(f"SET {name} = {quote(old.decode())}")
                if insert:
                    self.insert(conn, insert, body, post)
                else:
                    self.select(conn, sql, params, post)
            finally:
                for statement in undo:
                    run(conn, statement)

    def insert(self, conn, parts, body, post):
        statement, fmt, data = parts[0].decode(), parts[1], parts[2]
        started = time.monotonic()
        if not post:
            raise Failure(164, "Cannot execute query in readonly mode: method GET implies readonly.")
        if fmt == "Values" and body.ended:
            # Here the values may be expressions and parameters, which a stream's may not.
            result = run(conn, f"{statement} VALUES {data.decode()}")
            return self.answer(200, "", [summary(started, result)])
        try:
            stream = conn.send_insert(statement, fmt)
            try:
                if data:
                    conn.insert_append(stream, data)
                while data := body.read():
                    conn.insert_append(stream, data)
            except BaseException:
                conn.insert_cancel(stream)
                raise
            written = conn.insert_done(stream).rows_written()
        except RuntimeError as e:
            raise Failure.of(e) from None
        self.answer(200, "", [summary(started, written=written)])

    def select(self, conn, sql, params, post):
        started = time.monotonic()
        plan = conn.classify_query(sql.decode())
        kind = plan["query_class"].name
        if plan["statement_count"] > 1:
            raise Failure(62, "Syntax error (Multi-statements are not allowed).")
        if kind == "MUTATING" and not post:
            raise Failure(164, "Cannot execute query in readonly mode: method GET implies readonly.")

        tokens = list(words(sql))
        while tokens and tokens[-1][2] == b";":
            sql = sql[:tokens.pop()[0]]
        fmt = params.get("default_format") or self.headers.get("X-ClickHouse-Format") or "TabSeparated"
        clause = len(sql)
        for this, name, after in zip(tokens, tokens[1:], [t[2] for t in tokens[2:]] + [b""]):
            if this[2] == b"format" and name[2][:1].isalpha() and after in (b"", b"settings"):
                clause, fmt = this[0], sql[name[0]:name[1]].decode()

        code = Identity()
        if params.get("compress") == "1":
            code = Native()
        elif params.get("enable_http_compression") != "0":
            accepted = [e.split(";")[0].strip() for e in self.headers.get("Accept-Encoding", "").split(",")]
            code = next((c for c in (Lz4, Gzip) if c.name in accepted), Identity)()
        # A tag per answer marks an error inside the body, as servers since 25.11 do.
        tag = "".join(choice("abcdefghijklmnopqrstuvwxyz") for _ in range(16))
        text = fmt.startswith(("T", "C", "V", "J", "P", "X", "M")) and fmt != "Parquet"
        headers = [("X-ClickHouse-Format", fmt), ("X-ClickHouse-Exception-Tag", tag),
                   ("Content-Type", "text/plain; charset=UTF-8" if text else "application/octet-stream")]

        if kind == "READ_ONLY":
            source = piped(conn, sql[:clause].decode(), sql[clause:].decode() or f"FORMAT {fmt}")
        else:
            result = run(conn, sql.decode(), fmt)
            source = iter((result.bytes() or b"", result))
        limit = max(MIB, int(params.get("buffer_size") or params.get("http_response_buffer_size") or 0))
        if "1" in (params.get("wait_end_of_query"), params.get("http_wait_end_of_query")):
            limit = float("inf")
        # Everything before the headers is sent waits here, on disk if it is much.
        held, size = tempfile.SpooledTemporaryFile(64 * MIB), 0

        def start(result):
            nonlocal held, code
            if not size:
                code = Identity()
            self.begin(200, [*headers, *[("Content-Encoding", code.name)][:bool(code.name)], summary(started, result)])
            held.seek(0)
            while data := held.read(MIB):
                self.write(code.pack(data))
            held = held.close()

        result = None
        try:
            for item in source:
                if not isinstance(item, bytes):
                    result = item
                elif held:
                    size += held.write(item)
                    if size >= limit:
                        start(None)
                else:
                    self.write(code.pack(item))
        except Failure as e:
            if not held:
                message = e.text.encode()
                self.write(code.pack(b"\r\n__exception__\r\n%b\r\n%b%d %b\r\n__exception__\r\n"
                                     % (tag.encode(), message, len(message), tag.encode())))
            # Without its last chunk the answer is not whole for those who do not know the tag either.
            raise
        finally:
            if hasattr(source, "close"):
                source.close()
        if held:
            start(result)
        self.write(code.end())
        self.finish_answer()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the engine's data; kept between runs")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port, printed")
    parser.add_argument("--password", help="refuse requests without it (any user name)")
    args = parser.parse_args()
    Handler.password = args.password
    Engine.start(os.path.abspath(args.data))
    server = Server((args.host, args.port), Handler)
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"ready http://{args.host}:{server.server_port} engine {Engine.version}", flush=True)
    while not stop.wait(1):
        pass
    server.shutdown()
    server.server_close()
    with Engine.lock:
        for conn, *_ in Engine.sessions.values():
            conn.close()
    Engine.base.close()
    os._exit(0)  # requests still running do not hold up the stop


if __name__ == "__main__":
    main()
