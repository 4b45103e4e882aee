"""dns, dns query: names of Services, without an agent or with one."""

import contextlib
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .options import (
    FAILED,
    VERBOSE,
    answering_options,
    cluster_options,
    dns_listen_option,
    emit,
    manifests_option,
    open_answers,
    open_cluster,
    open_dns,
    open_source,
    output_option,
    say_problems,
    settle,
    together,
    verbose_option,
    zone_options,
)

if TYPE_CHECKING:
    from ..agent import Log, Source
    from ..configuration import Configuration
    from ..dns.answers import Answers

DEFAULT_LISTEN = ("127.0.0.1:53",)
_source_options = together(
    click.option("--config", "config_file", metavar="FILE", help="AgentConfiguration file; options here win over it."),
    manifests_option,
    cluster_options,
)


@click.group(short_help="Answer names of Services (daemon), or explain an answer.", invoke_without_command=True)
@_source_options
@dns_listen_option("--listen", "Where, over UDP and TCP; repeatable; default 127.0.0.1:53; port 0: any that is free.")
@zone_options
@answering_options
@click.option(
    "--log-format", type=click.Choice(("auto", "human", "json")), help="auto: human on a terminal, else JSON."
)
@verbose_option
@click.pass_context
def dns(ctx: click.Context, /, config_file: str | None, **given: Any) -> None:
    """\b
    dataplane dns -f services.d --listen 127.0.0.1:5300
    dataplane dns --kubeconfig /etc/kubernetes/proxy.conf --listen 10.0.0.10:53 --dns-upstream 192.0.2.53
    dataplane dns query hostnames -f services.d

    Answers as the Kubernetes DNS specification 1.1.0 and CoreDNS do: A and AAAA of Services and endpoints, SRV, PTR,
    CNAME. Follows the manifests or the API; needs no kernel, and root only for port 53. An agent does the same beside
    its work with `run --dns`. SIGTERM ends it.
    """
    if ctx.invoked_subcommand is not None:
        if config_file or any(value not in (None, ()) for value in given.values()):
            raise UsageError(f"options of {ctx.invoked_subcommand} go behind its name")
        return
    import asyncio

    from ..journal import open_journal

    settings = settle(config_file, given)
    log = open_journal(settings.log_format, verbose=bool(ctx.meta.get(VERBOSE)))
    opened = open_cluster(settings, log)
    source: Source = opened[0] if opened else open_source(settings)
    asyncio.run(_serve(settings, source, log))


async def _serve(settings: "Configuration", source: "Source", log: "Log") -> None:
    import asyncio
    import signal

    answers = open_answers(settings)
    server = open_dns(settings, answers, settings.dns_listen or DEFAULT_LISTEN, log)()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    log.info("names served", addresses=list(map(str, server.listens)), zone=settings.cluster_domain)
    following = asyncio.create_task(_follow(source, answers, log))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()  # a dead source is not a quiet one
    finally:
        for task in (following, stopping):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        await source.close()
        await server.close()
    log.info("stopped", **server.status())


async def _follow(source: "Source", answers: "Answers", log: "Log") -> None:
    from ..printable import printable

    await source.ready()
    told: set[object] = set()
    async for update in source.updates():
        answers.update(update.changed)
        for problem in update.problems:
            if problem not in told:
                log.warning("bad input", problem=printable(str(problem), 500))
        told = set(update.problems)


@dns.command(short_help="What is answered to a name, and how that came about.")
@click.argument("name")
@click.argument("qtype", metavar="[TYPE]", default="A")
@_source_options
@zone_options
@click.option("-n", "--namespace", default="default", show_default=True, help="Of the pod that asks: its search path.")
@output_option("text", "json", "yaml")
@verbose_option
@click.pass_context
def query(
    ctx: click.Context, /, name: str, qtype: str, config_file: str | None, namespace: str, output: str, **given: Any
) -> int:
    """\b
    dataplane dns query hostnames
    dataplane dns query _http._tcp.web.default.svc.cluster.local SRV -f services.d
    dataplane dns query 10.0.1.175 -o json

    Asks the running agent (`run --dns`), or looks into manifests or the API named here. A short name is tried with the
    search domains, as in a pod. Exit status 1: there is no answer.
    """
    from ..dns.explanation import as_lines, explain
    from ..printable import printable

    settings = settle(config_file, given)
    if settings.manifests or settings.kubeconfig or settings.in_cluster:
        answers = open_answers(settings)
        _read_once(settings, answers)
        try:
            document = explain(answers, name, qtype, namespace)
        except ValueError as error:
            raise UsageError(printable(str(error))) from None
    else:
        import json

        from ..control_socket import ControlClient

        with ControlClient() as agent:
            document = json.loads(agent.ask("name", name=name, type=qtype, namespace=namespace))
    if output == "text":
        for line in as_lines(document):
            click.echo(printable(line, 4096))
    else:
        emit(document, output)
    return 0 if document["answers"] else FAILED


def _read_once(settings: "Configuration", answers: "Answers") -> None:
    import asyncio

    from ..journal import open_journal

    async def read(source: "Source") -> None:
        try:
            await asyncio.wait_for(source.ready(), 60)
            update = source.read()
            answers.update(update.changed)
            say_problems(update.problems)
        finally:
            await source.close()

    log = open_journal(settings.log_format)
    opened = open_cluster(settings, log)
    asyncio.run(read(opened[0] if opened else open_source(settings)))
