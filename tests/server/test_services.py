"""What every gRPC service should have: health, reflection, options that describe themselves, models."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import nst_server
from nst.v1 import job_pb2, model_service_pb2, options_pb2, style_transfer_service_pb2
from nst_server import Server
from nst_server.server import SERVICES
from tests.server.conftest import FOREVER, Caller, read_until, rest, watched

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]


async def test_health_of_every_service_is_serving(caller: Caller) -> None:
    """For the whole and for each service by name; an unknown one is NOT_FOUND."""
    stub = health_pb2_grpc.HealthStub(caller.channel)
    for service in ("", *SERVICES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    refusal = await caller.refusal(stub.Check(health_pb2.HealthCheckRequest(service="nst.v1.None")))
    assert refusal.code == grpc.StatusCode.NOT_FOUND


async def test_whoever_has_filled_a_server_with_streams_can_cancel(serve: Callable[..., Any], ask: Ask) -> None:
    """One stream more is refused with the quota named; calls of one answer pass; a stream that ends makes room."""
    _, client = await serve(max_streams=2)
    created = await client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=ask(**FOREVER)))
    watch = style_transfer_service_pb2.WatchJobRequest(name=created.name)
    open_calls = [client.jobs.WatchJob(watch) for _ in range(2)]
    for call in open_calls:
        await read_until(call, "snapshot")
    for refused in (watched(client, created.name), ask()):
        refusal = await client.refusal(refused)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert refusal.message.startswith("2 streams are open already")
        assert refusal.quota == "streams"

    cancelled = await client.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=created.name))
    assert cancelled.state == job_pb2.JOB_STATE_CANCELLED
    for call in open_calls:
        await rest(call)
    assert (await client.told(ask())).job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_reflection_lists_the_services_and_their_methods(shared: Server) -> None:
    """A client that knows nothing of the contract finds it all, the comments' types included."""

    def reflected() -> tuple[set[str], set[str]]:
        with grpc.insecure_channel(shared.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            services = set(database.get_services())
            pool = descriptor_pool.DescriptorPool(database)
            methods = {method.name for service in SERVICES for method in pool.FindServiceByName(service).methods}
            assert pool.FindMessageTypeByName("nst.v1.StylizeOptions").fields_by_name["iterations"]
        return services, methods

    services, methods = await asyncio.to_thread(reflected)

    assert {*SERVICES, "grpc.health.v1.Health"} <= services
    assert methods == {
        "Stylize",
        "CreateJob",
        "GetJob",
        "ListJobs",
        "WatchJob",
        "UpdateJob",
        "CancelJob",
        "DeleteJob",
        "DescribeOptions",
        "CreateUpload",
        "GetUpload",
        "WriteUpload",
        "GetImage",
        "DownloadImage",
        "CreateStyle",
        "GetStyle",
        "ListStyles",
        "DeleteStyle",
        "ExportStyle",
        "ImportStyle",
        "ListModels",
        "ExportModel",
    }


async def test_every_option_is_described(caller: Caller) -> None:
    """In the order of the contract, with a type, a default and a meaning."""
    response = await caller.jobs.DescribeOptions(style_transfer_service_pb2.DescribeOptionsRequest())

    assert [option.name for option in response.options] == [
        field.name for field in options_pb2.StylizeOptions.DESCRIPTOR.fields
    ]
    for option in response.options:
        assert option.type
        assert option.description.endswith(".")
        assert option.default_value.WhichOneof("kind")
        choice = option.type == options_pb2.OPTION_TYPE_CHOICE
        assert bool(option.choices) == choice
        bounded = not choice and option.type != options_pb2.OPTION_TYPE_BOOLEAN
        assert option.HasField("minimum") == option.HasField("maximum") == bounded


async def test_models_are_listed_the_default_first(caller: Caller, tiny_weights_file: Path) -> None:
    """Exactly one default; what is here has a hash, what is not says so; layers from the image upwards."""
    response = await caller.models.ListModels(model_service_pb2.ListModelsRequest())
    models = response.models

    assert [model.is_default for model in models] == [True] + [False] * (len(models) - 1)
    assert models[0].name == "models/vgg16"
    assert models[0].state == model_service_pb2.MODEL_STATE_AVAILABLE
    assert models[0].sha256 == hashlib.sha256(tiny_weights_file.read_bytes()).hexdigest()
    for model in models:
        assert (model.state == model_service_pb2.MODEL_STATE_AVAILABLE) == bool(model.sha256)
    (vgg19,) = [model for model in models if model.name == "models/vgg19"]
    assert vgg19.state == model_service_pb2.MODEL_STATE_NOT_FETCHED
    for model in models:
        assert [layer.name for layer in model.layers] == sorted(layer.name for layer in model.layers)
        assert model.layers[0].name == "relu1_1"
        assert (model.layers[0].stride_px, model.layers[0].receptive_field_px) == (1, 3)
        assert model.license
        assert model.description


async def test_models_are_listed_in_pages(caller: Caller) -> None:
    """One at a time gives the same list."""
    whole = await caller.models.ListModels(model_service_pb2.ListModelsRequest())
    listed, token = [], ""
    while True:
        page = await caller.models.ListModels(model_service_pb2.ListModelsRequest(page_size=1, page_token=token))
        listed.extend(page.models)
        if not (token := page.next_page_token):
            break
    assert listed == list(whole.models)


def test_public_names_are_pinned() -> None:
    """What other packages may import."""
    assert nst_server.__all__ == ["Server", "Settings"]
