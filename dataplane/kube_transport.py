"""HTTP to a Kubernetes API server: whole answers and streams of lines.

Who and where the server is, and who we are to it (kubeconfig files, service accounts, tokens that rotate, client
certificates, `exec` plugins) is read by lightkube; the bytes go through httpx2, which it brings. A transport opens its
connection when it is first needed and reads the configuration then; so `close`, which follows every failure, also takes
up rotated certificates. Of the environment no proxy is used.
"""

import asyncio
import contextlib
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import httpx2
import msgspec
import yaml
from lightkube import ConfigError, KubeConfig, SingleConfig
from lightkube.config.client_adapter import ExecAuth, user_auth, verify_cluster
from lightkube.config.models import User

from .errors import ApiError
from .printable import printable

ConfigReader = Callable[[], SingleConfig]

ANSWER_SECONDS = 120.0
"""A whole answer, at most."""
READ_SECONDS = 30.0
"""Between two pieces of a whole answer, at most."""
CONNECT_SECONDS = 10.0
LINE_BYTES = 16 << 20
"""A line of a stream, at most; an object in etcd is at most 1.5 MiB."""
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 35_000),
]
"""A peer that is gone without a word is noticed after 35 s."""


class ConfigFault(ValueError):
    """A kubeconfig that cannot be used; says why."""


def kubeconfig_reader(path: str, *, allow_exec: bool = False) -> ConfigReader:
    """Reads the current context of a kubeconfig file; raises ConfigFault."""

    def read() -> SingleConfig:
        try:
            config = KubeConfig.from_file(path).get()
        except ConfigError as error:
            raise ConfigFault(str(error)) from None
        except OSError as error:
            raise ConfigFault((error.strerror or str(error)).lower()) from None
        except yaml.YAMLError as error:
            raise ConfigFault(f"not YAML: {error}") from None
        except (KeyError, TypeError, AttributeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise ConfigFault(f"not a kubeconfig: {type(error).__name__}: {error}") from None
        assert config is not None
        if config.user is not None and config.user.exec and not allow_exec:
            raise ConfigFault("the user's credentials come from a program (exec), which is run only when allowed")
        if not config.cluster.server.startswith(("https://", "http://")):
            raise ConfigFault("cluster.server is no http(s) address")
        return config

    return read


def service_account_reader() -> ConfigReader:
    """Reads the service account that Kubernetes gives to every pod; raises ConfigFault."""

    def read() -> SingleConfig:
        try:
            config = KubeConfig.from_service_account().get()
        except ConfigError as error:
            raise ConfigFault(f"no service account here ({error}): is this a pod?") from None
        except KeyError as error:
            raise ConfigFault(f"the environment lacks {error}: is this a pod?") from None
        except OSError as error:
            raise ConfigFault((error.strerror or str(error)).lower()) from None
        assert config is not None
        return config

    return read


class _Exec(ExecAuth):
    """lightkube's, which knows neither client.authentication.k8s.io/v1 nor KUBERNETES_EXEC_INFO, with both."""

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        plugin = self._exec
        environment = dict(os.environ)
        environment |= {variable.name: variable.value for variable in plugin.env or ()}
        info = {"apiVersion": plugin.apiVersion, "kind": "ExecCredential", "spec": {"interactive": False}}
        environment["KUBERNETES_EXEC_INFO"] = json.dumps(info)
        return [plugin.command, *(plugin.args or ())], environment


def _auth(config: SingleConfig) -> httpx2.Auth | None:
    user = config.user or User()
    if user.token_file is not None:
        user.token_file = os.fspath(config.abs_file(user.token_file))
    elif user.token is None and user.exec:
        return _Exec(user.exec)
    found: httpx2.Auth | None = user_auth(user)
    return found


def _look_for_files(config: SingleConfig) -> None:
    """ConfigFault names a certificate file that cannot be read; what OpenSSL says of it does not."""
    user = config.user or User()
    for field, path in (
        ("certificate-authority", config.cluster.certificate_auth),
        ("client-certificate", user.client_cert),
        ("client-key", user.client_key),
    ):
        if path:
            try:
                with Path(config.abs_file(path)).open("rb"):
                    pass
            except OSError as error:
                raise ConfigFault(f"{field} {path}: {(error.strerror or str(error)).lower()}") from None


class KubeTransport:
    """One connection to the API server, or none for the moment. Failures are ApiErrors."""

    def __init__(self, read_config: ConfigReader, answer_seconds: float = ANSWER_SECONDS) -> None:
        self._answer_seconds = answer_seconds
        self._read_config = read_config
        self._client: httpx2.AsyncClient | None = None

    def _opened(self) -> httpx2.AsyncClient:
        if self._client is None:
            config = self._read_config()
            secure = config.cluster.server.startswith("https://")
            if secure:
                _look_for_files(config)
            try:
                verify = verify_cluster(config.cluster, config.user or User(), config.abs_file) if secure else False
            except (ValueError, OSError) as error:  # ssl.SSLError and binascii.Error are such
                raise ConfigFault(f"certificates: {error}") from None
            self._client = httpx2.AsyncClient(
                base_url=config.cluster.server,
                auth=_auth(config),
                transport=httpx2.AsyncHTTPTransport(verify=verify, socket_options=_KEEPALIVE),
                timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
                headers={"Accept": "application/json", "User-Agent": "dataplane"},
            )
        return self._client

    async def close(self) -> None:
        """Let go of the connection; the next request opens one, by the configuration as it is then."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(httpx2.HTTPError, OSError):
                await client.aclose()

    async def get(self, path: str, parameters: Mapping[str, str]) -> bytes:
        """A whole answer."""
        with _failures():
            async with asyncio.timeout(self._answer_seconds):
                answer = await self._opened().get(path, params=dict(parameters))
        if answer.status_code != 200:
            raise _refusal(answer, answer.content)
        return answer.content

    async def post(self, path: str, body: Mapping[str, object]) -> None:
        """Create an object."""
        with _failures():
            async with asyncio.timeout(self._answer_seconds):
                answer = await self._opened().post(path, json=dict(body))
        if answer.status_code not in (200, 201, 202):
            raise _refusal(answer, answer.content)

    @contextlib.asynccontextmanager
    async def stream(self, path: str, parameters: Mapping[str, str]) -> AsyncIterator[AsyncIterator[list[bytes]]]:
        """An answer that goes on: the whole lines that came together; how long to wait is the caller's business."""
        with _failures():
            timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
            async with self._opened().stream("GET", path, params=dict(parameters), timeout=timeout) as answer:
                if answer.status_code != 200:
                    raise _refusal(answer, await answer.aread())
                yield _lines(answer)


async def _lines(answer: httpx2.Response) -> AsyncIterator[list[bytes]]:
    rest = bytearray()
    async for piece in answer.aiter_bytes():
        rest += piece
        end = rest.rfind(b"\n", max(0, len(rest) - len(piece)))
        if end >= 0:
            whole = bytes(memoryview(rest)[:end])
            del rest[: end + 1]
            yield [line for line in whole.split(b"\n") if line]
        if len(rest) > LINE_BYTES:
            raise ApiError(f"a line of more than {LINE_BYTES} bytes")


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Whatever goes wrong below is an ApiError."""
    try:
        yield
    except (ConfigFault, ConfigError) as error:
        raise ApiError(f"kubeconfig: {error}") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ApiError(f"{type(error).__name__}: {error}".rstrip(": ")) from None
    except TimeoutError:
        raise ApiError("no whole answer in time") from None
    except (OSError, ssl.SSLError) as error:
        raise ApiError(str(error)) from None


def _refusal(answer: httpx2.Response, content: bytes) -> ApiError:
    """An HTTP status other than 200, in the server's words."""
    reason = answer.reason_phrase
    with contextlib.suppress(ValueError, UnicodeDecodeError):
        document = json.loads(content[:65536])
        if isinstance(document, dict) and isinstance(document.get("message"), str):
            reason = document["message"]
    wait = answer.headers.get("Retry-After", "")
    seconds = float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 6 else 0.0
    return ApiError(printable(f"HTTP {answer.status_code}: {reason}", 500), answer.status_code, seconds)


def server_name(read_config: ConfigReader) -> str:
    """The server's address, for people; raises ConfigFault."""
    return printable(read_config().cluster.server, 500)
