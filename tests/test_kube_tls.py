"""HTTPS to the API server: its authority, our certificate, tokens and certificates that rotate, and what is told when
they do not fit."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataplane.errors import ApiError
from dataplane.kube_transport import KubeTransport, kubeconfig_reader

from .certificates import Authority
from .kube_api import KubeApi, kubeconfig, service
from .test_kube_watch import QUICK, following, played, until


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("others"))


def config(folder: Path, url: str, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    document = json.loads(kubeconfig(url, user))
    document["clusters"][0]["cluster"] |= cluster
    path = folder / "kubeconfig"
    path.write_text(json.dumps(document))
    return path


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


async def asks(path: Path) -> bytes:
    transport = KubeTransport(kubeconfig_reader(str(path)), 10)
    try:
        return await transport.get("/api/v1/services", {})
    finally:
        await transport.close()


@pytest.mark.parametrize("form", ["files", "data"])
def test_a_server_and_a_client_that_know_each_other_by_certificates(
    tmp_path: Path, ours: Authority, others: Authority, form: str
) -> None:
    certificate, key = others.sign("node-1", "extendedKeyUsage=clientAuth")
    if form == "files":
        cluster = {"certificate-authority": str(ours.certificate)}
        user = {"client-certificate": str(certificate), "client-key": str(key)}
    else:
        cluster = {"certificate-authority-data": encoded(ours.certificate)}
        user = {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}

    async def story(api: KubeApi) -> None:
        api.put(service("a"))
        assert b'"ServiceList"' in await asks(config(tmp_path, api.url, cluster, user))
        await api.stop()

    played(story, tls=ours.server_context(clients=others))


@pytest.mark.parametrize(
    ("cluster", "reason"),
    [
        (lambda ours, others: {"certificate-authority": str(others.certificate)}, "certificate verify failed"),
        (lambda ours, others: {}, "certificate verify failed"),
        (
            lambda ours, others: {"certificate-authority": "/nonexistent/ca.crt"},
            "-authority /nonexistent/ca.crt: no such file",
        ),
        (lambda ours, others: {"certificate-authority-data": "bm90IG9uZQ=="}, "kubeconfig: certificates"),
        (lambda ours, others: {"certificate-authority-data": "&&&"}, "kubeconfig: certificates"),
    ],
    ids=["another authority", "no authority", "no such file", "no certificate", "no base64"],
)
def test_an_authority_that_does_not_fit_is_told(
    tmp_path: Path,
    ours: Authority,
    others: Authority,
    cluster: Callable[[Authority, Authority], dict[str, Any]],
    reason: str,
) -> None:
    async def story(api: KubeApi) -> None:
        with pytest.raises(ApiError, match=f"(?is){reason}"):
            await asks(config(tmp_path, api.url, cluster(ours, others), {}))
        assert not api.asked
        await api.stop()

    played(story, tls=ours.server_context())


def test_a_name_that_the_servers_certificate_lacks_is_told(tmp_path: Path, ours: Authority) -> None:
    async def story(api: KubeApi) -> None:
        cluster = {"certificate-authority": str(ours.certificate)}
        with pytest.raises(ApiError, match=r"certificate is not valid for '127\.0\.0\.1'"):
            await asks(config(tmp_path, api.url, cluster, {}))
        await api.stop()

    played(story, tls=ours.server_context(names="DNS:kubernetes.default.svc"))


def test_a_client_without_the_certificate_that_is_asked_for_is_told(
    tmp_path: Path, ours: Authority, others: Authority
) -> None:
    async def story(api: KubeApi) -> None:
        with pytest.raises(ApiError, match=r"(?i)certificate.required|disconnected"):
            await asks(config(tmp_path, api.url, {"certificate-authority": str(ours.certificate)}, {}))
        await api.stop()

    played(story, tls=ours.server_context(clients=others))


def test_a_watch_goes_on_with_a_token_that_has_rotated_and_an_authority_that_was_replaced(
    tmp_path: Path, ours: Authority, others: Authority
) -> None:
    token, authority = tmp_path / "token", tmp_path / "ca.crt"
    token.write_text("first")
    authority.write_bytes(ours.certificate.read_bytes())

    async def story(api: KubeApi) -> None:
        api.put(service("a"))
        cluster, user = {"certificate-authority": str(authority)}, {"tokenFile": str(token)}
        async with following(api, tmp_path, QUICK, lambda url: config(tmp_path, url, cluster, user)) as follower:
            await until(lambda: follower.seen)
            token.write_text("second")
            api.token = "second"
            api.break_all()
            api.put(service("b"))
            await until(lambda: len(follower.seen) == 2)
            await api.stop()
            api.tls = others.server_context()
            await api.start()
            api.put(service("c"))
            await until(lambda: "certificate" in follower.source.reflectors[0].last_error)
            assert len(follower.seen) == 2
            authority.write_bytes(others.certificate.read_bytes())
            await until(lambda: len(follower.seen) == 3)

    played(story, tls=ours.server_context(), token="first")
