"""Runs the gateway until it is asked to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import sys

import uvicorn

from feedback.heartbeat import beat
from policies.server_connection import ServerConnection
from serving.access.certificates import Certificates, Watched
from serving.config import host_and_port
from serving.gateway.app import make_app
from serving.gateway.config import GatewayConfig

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 30
_LOOK_SECONDS = 1.0
_MOST_CONNECTIONS = 1000


def run_gateway(config: GatewayConfig, server: ServerConnection) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        CertificateError: a certificate cannot be used.
        ServerConnectionError: a certificate for the server cannot be read.
    """
    server.credentials()
    options = uvicorn.Config(
        make_app(config, server), host=config.host, port=config.port, log_config=None, access_log=False,
        timeout_graceful_shutdown=_GRACE_SECONDS, server_header=False, limit_concurrency=_MOST_CONNECTIONS,
    )  # fmt: skip
    files = None
    if config.tls_certificate and config.tls_key:
        files = Certificates(config.tls_certificate, config.tls_key, config.tls_client_ca)
        options.ssl_certfile, options.ssl_keyfile = config.tls_certificate, str(config.tls_key)
        options.ssl_ca_certs = str(config.tls_client_ca) if config.tls_client_ca else None
        options.ssl_cert_reqs = ssl.CERT_REQUIRED if config.tls_client_ca else ssl.CERT_NONE
    # uvicorn ends in order, and then as the signal ends what does not handle it: with another exit code than 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    logger.info("listening on %s, for the server at %s", host_and_port(config.host, config.port), server.address)
    asyncio.run(_serve(options, files))


async def _serve(options: uvicorn.Config, files: Certificates | None) -> None:
    watched = Watched(files) if files else None
    if watched:
        watched.has_changed()

    async def look() -> None:
        while True:
            beat()
            if watched and watched.has_changed() and options.ssl:
                if watched.files.client_ca:
                    # What a context trusts can only grow, and a root may have been replaced for a reason.
                    logger.info("the certificates have changed: ending, to be started again with them")
                    server.should_exit = True
                else:
                    # New connections meet the new certificate.
                    options.ssl.load_cert_chain(watched.files.certificate, watched.files.key)
            await asyncio.sleep(_LOOK_SECONDS)

    server = uvicorn.Server(options)
    looking = asyncio.ensure_future(look())
    try:
        await server.serve()
    finally:
        looking.cancel()
