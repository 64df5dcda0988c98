"""TLS and SASL to Kafka: a real cluster that asks for both, and URLs that say it wrong."""

from contextlib import closing
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from feedback.bus.contract import BusError, TopicSpec
from feedback.bus.kafka_security import read_security
from feedback.bus.url import open_bus
from tests.feedback.bus.test_bus import make_records, read
from tests.kafka_broker import free_port, running_apache_kafka

PASSWORD = "correct horse"
PROPERTIES = """
listeners=SASL_SSL://127.0.0.1:{port},PLAINTEXT://127.0.0.1:{inner},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=SASL_SSL://127.0.0.1:{port},PLAINTEXT://127.0.0.1:{inner},CONTROLLER://127.0.0.1:{controller}
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \\
  user_alignd="{password}";
ssl.keystore.type=PEM
ssl.keystore.location={pair}
"""


def test_a_cluster_that_asks_for_tls_and_a_password_takes_who_has_both(tmp_path: Path) -> None:
    root, other = trustme.CA(), trustme.CA()
    server = root.issue_cert("127.0.0.1")
    key = load_pem_private_key(server.private_key_pem.bytes(), None)
    pair = tmp_path / "broker.pem"
    chain = b"".join(each.bytes() for each in server.cert_chain_pems)
    # Java reads keys in this form alone.
    pair.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + chain)
    for name, ca in (("root", root), ("other", other)):
        ca.cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    (tmp_path / "right").write_text(PASSWORD + "\n")
    (tmp_path / "wrong").write_text("guess")
    port = free_port()
    properties = PROPERTIES.format(port=port, inner=free_port(), controller=free_port(), password=PASSWORD, pair=pair)

    def url(ca: str, password: str) -> str:
        return (
            f"kafka://127.0.0.1:{port}/secret?security_protocol=SASL_SSL&ssl_cafile={tmp_path / ca}.pem"
            f"&sasl_mechanism=PLAIN&sasl_username=alignd&sasl_password_file={tmp_path / password}"
        )

    with running_apache_kafka(tmp_path / "kafka", properties, port):
        with closing(open_bus(url("root", "right"))) as bus:
            bus.create_topics([TopicSpec("samples", partitions=2)])
            records = make_records("samples", 20)
            bus.publish(records)
            with closing(bus.consume(["samples"], {})) as consumer:
                assert sorted(each.value for each in read(consumer, 20)) == sorted(each.value for each in records)
        for bad in (url("other", "right"), url("root", "wrong"), f"kafka://127.0.0.1:{port}/secret"):
            with pytest.raises(BusError):
                open_bus(bad)


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("sasl_password=secret", "sasl_password: a Kafka bus takes"),
        ("ssl_cafile=/ca.pem", "goes with security_protocol SSL"),
        ("security_protocol=TLS", "security_protocol is one of"),
        ("security_protocol=SASL_SSL&sasl_username=a", "goes with sasl_mechanism"),
        ("security_protocol=SSL&sasl_username=a&sasl_mechanism=PLAIN&sasl_password_file=/x", "no other protocol does"),
        ("security_protocol=SASL_SSL&sasl_username=a&sasl_mechanism=MD5&sasl_password_file=/x", "sasl_mechanism is"),
    ],
)
def test_what_a_url_says_wrong_is_said(query: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_security(query)
