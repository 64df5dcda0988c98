"""Server reflection, by both of its names: grpc.reflection.v1, which tools ask for today, and v1alpha before it."""

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

_NAME = "grpc.reflection.v1.ServerReflection"


def add_reflection(service_names: Sequence[str], server: grpc.aio.Server) -> None:
    """Adds both services, which tell of the services named and of themselves."""
    _describe_v1()
    names = [*service_names, reflection.SERVICE_NAME, _NAME]
    reflection.enable_server_reflection(names, server)
    # The two differ in their package alone, so the classes of v1alpha, the only ones in grpcio-reflection, do for both.
    method = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_NAME, {"ServerReflectionInfo": method}),))


def _describe_v1() -> None:
    """Adds the contract of v1 to what this process knows, and so to what reflection can tell."""
    try:
        descriptor_pool.Default().FindServiceByName(_NAME)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        renamed = text_format.MessageToString(file).replace("v1alpha", "v1").replace("deprecated: true", "")
        file = text_format.Parse(renamed, descriptor_pb2.FileDescriptorProto())
        descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
