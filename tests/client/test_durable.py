"""Jobs that outlive connections, and clients that do not notice: against real servicers that break on purpose."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from nst.v1 import (
    image_service_pb2,
    image_service_pb2_grpc,
    job_pb2,
    style_transfer_service_pb2,
    style_transfer_service_pb2_grpc,
)
from nst_client import (
    NO_PREVIEW,
    AlreadyExistsError,
    AsyncClient,
    BrokenStreamError,
    Client,
    ClientClosedError,
    DeadlineExceededError,
    FailedPreconditionError,
    Frame,
    ImageName,
    InvalidArgumentError,
    Job,
    JobCancelledError,
    JobResult,
    JobState,
    NotFoundError,
    Preview,
    Progress,
    Result,
    ServerError,
    Snapshot,
    StateChange,
    StopReason,
    StyleInput,
    UnavailableError,
    UnknownOptionError,
    channel,
    requests,
    retry,
    transfers,
)

CODE = grpc.StatusCode
STOPPING = ErrorInfo(reason="SERVER_STOPPING", domain="nst")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests short; that pauses grow is a test of its own."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def broken(aborted: Any) -> Any:
    """Return the step that ends a story as a broken connection does."""
    return aborted(CODE.UNAVAILABLE, "Socket closed")


def numbers(events: list[Any]) -> list[int]:
    """Return the numbers of the events that have one of their own."""
    return [event.sequence for event in events if isinstance(event, StateChange | Progress | Result)]


# Broken streams


def test_break_before_the_first_event(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """The request is sent again as it was, so that the server knows it for the same."""
    server = serve(tell().then(broken), tell().whole())
    assert caller.result(server.address, b"p", b"s").iteration == 4
    first, second = server.asked("Stylize")
    assert first == second
    assert first.request_id
    assert not first.cancel_on_disconnect
    assert server.asked("WatchJob") == []


def test_break_in_the_middle(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """The stream goes on after the last event: one snapshot, every number once, the same previews."""
    began = tell().snapshot().state("RUNNING").progress(0).frame(0).progress(1).then(broken)
    went_on = tell().after(3).snapshot(state="RUNNING").progress(2).frame(2).result().state("SUCCEEDED")
    server = serve(began, went_on)
    events = caller.events(server.address, b"p", b"s", preview=Preview(interval=2, size_px=64))
    kinds = [Snapshot, StateChange, Progress, Frame, Progress, Progress, Frame, Result, StateChange]
    assert [type(event) for event in events] == kinds
    assert numbers(events) == [1, 2, 3, 4, 5, 6]
    (watch,) = server.asked("WatchJob")
    assert (watch.name, watch.after_sequence, watch.preview.interval) == ("jobs/j1", 3, 2)
    assert watch.preview == server.requests[0].preview
    assert not server.cancelled.is_set()


def test_break_within_the_result(caller: Any, serve: Any, tell: Any, broken: Any, parts: Any) -> None:
    """Half a picture is dropped, and comes again from its beginning."""
    half, _ = parts(b"0123456789", "PNG", 2)
    began = tell().snapshot().state("RUNNING").event(numbered=True, result=job_pb2.Result(image=half, iteration=4))
    server = serve(began.then(broken), tell().after(1).snapshot().result(b"0123456789", parts=3).state("SUCCEEDED"))
    result = caller.result(server.address, b"p", b"s")
    assert (result.data, result.sequence) == (b"0123456789", 2)
    assert [watch.after_sequence for watch in server.asked("WatchJob")] == [1]


def test_break_within_a_frame(caller: Any, serve: Any, tell: Any, broken: Any, parts: Any) -> None:
    """Half a frame is dropped, and the frames go on."""
    half, _ = parts(b"0123456789", "JPEG", 2)
    began = tell().snapshot().event(frame=job_pb2.Frame(image=half, iteration=1)).then(broken)
    server = serve(began, tell().snapshot().frame(2).result().state("SUCCEEDED"))
    events = caller.events(server.address, b"p", b"s")
    assert [event.iteration for event in events if isinstance(event, Frame)] == [2]


def test_nothing_is_told_twice(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """Whatever a server sends again is passed over: numbered events, and a frame that was there before the break."""
    began = tell().snapshot().state("RUNNING").progress(0).frame(0).progress(1).frame(1).then(broken)
    again = tell().snapshot().state("RUNNING").progress(0).progress(1).frame(1, skipped=1).progress(2)
    again.frame(4, skipped=4).result().state("SUCCEEDED")
    events = caller.events(serve(began, again).address, b"p", b"s")
    assert numbers(events) == [1, 2, 3, 4, 5, 6]
    frames = [(event.iteration, event.skipped) for event in events if isinstance(event, Frame)]
    # The server counts from its stream's beginning, and two of the four had come.
    assert frames == [(0, 0), (1, 0), (4, 2)]


def test_break_after_the_last_event(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """A job that has been told to its end needs no second call."""
    server = serve(tell().whole().then(broken))
    assert caller.events(server.address, b"p", b"s")[-1].job.state is JobState.SUCCEEDED
    assert server.asked("WatchJob") == []


def test_job_is_as_new_as_it_was_ever_seen(serve: Any, tell: Any, broken: Any) -> None:
    """The snapshot after a break is newer than the events that follow it; `job` does not go back."""
    began = tell().snapshot(sequence=0).state("RUNNING", sequence=1).then(broken)
    went_on = tell().after(1).snapshot(state="PAUSED", sequence=3).state("QUEUED", sequence=2)
    went_on.state("PAUSED", sequence=3).state("RUNNING", sequence=4).result().state("SUCCEEDED", sequence=6)
    with Client(serve(began, went_on).address) as client:
        stream = client.stylize(b"p", b"s")
        seen = [(event.job.state, stream.job.state) for event in stream if isinstance(event, StateChange)]
    assert seen[1:4] == [("queued", "paused"), ("paused", "paused"), ("running", "running")]


def test_attempt_that_goes_back(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """A server that was killed repeats some iterations: other events with other numbers, so they are told."""
    began = tell().snapshot().state("RUNNING").progress(0).progress(1).progress(2).then(broken)
    went_on = tell().after(4, attempt=2).snapshot(state="RUNNING").progress(1).progress(2).progress(3)
    events = caller.events(serve(began, went_on.result().state("SUCCEEDED")).address, b"p", b"s")
    told = [(event.sequence, event.attempt, event.iteration) for event in events if isinstance(event, Progress)]
    assert told == [(2, 1, 0), (3, 1, 1), (4, 1, 2), (5, 2, 1), (6, 2, 2), (7, 2, 3)]


BROKEN_CALLS: list[Any] = [
    (CODE.UNAVAILABLE, "recvmsg:Connection reset by peer"),
    (CODE.UNAVAILABLE, "failed to connect to all addresses; last error: refused"),
    (CODE.UNAVAILABLE, "upstream connect error"),
    (CODE.INTERNAL, "Received RST_STREAM with error code 2"),
    (CODE.CANCELLED, "RST_STREAM with error code 8"),
    (CODE.UNKNOWN, "Stream removed"),
]


@pytest.mark.parametrize(("code", "words"), BROKEN_CALLS)
def test_ways_to_break(caller: Any, serve: Any, tell: Any, aborted: Any, code: Any, words: str) -> None:
    """GRPC and the proxies between have many words for a broken connection."""
    began = tell().snapshot().then(aborted(code, words))
    server = serve(began, tell().snapshot().result().state("SUCCEEDED"))
    assert caller.result(server.address, b"p", b"s").iteration == 4


@pytest.mark.parametrize("code", [CODE.INTERNAL, CODE.UNKNOWN, CODE.DATA_LOSS, CODE.NOT_FOUND])
def test_other_errors_end_the_stream(caller: Any, serve: Any, tell: Any, aborted: Any, code: Any) -> None:
    """A server that fails is not asked again, and its job is left as it is."""
    server = serve(tell().snapshot().then(aborted(code, "oh")), tell().snapshot().result().state("SUCCEEDED"))
    with pytest.raises((ServerError, NotFoundError), match="oh"):
        caller.events(server.address, b"p", b"s")
    assert len(server.calls) == 1


def test_server_that_restarts(caller: Any, serve: Any, tell: Any) -> None:
    """A real server goes away, and another comes up at the same port."""
    first = serve(tell().snapshot().progress(0).then(30))
    port = int(first.address.rpartition(":")[2])

    def restart() -> None:
        first.grpc_server.stop(grace=0).wait(5)
        serve(tell().after(1).snapshot().progress(1).result().state("SUCCEEDED"), port=port)

    threading.Timer(0.2, restart).start()
    assert numbers(caller.events(first.address, b"p", b"s")) == [1, 2, 3, 4]


def test_server_that_falls_silent(
    caller: Any, serve: Any, tell: Any, wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection over which nothing comes any more, not even an end, is noticed, and left for a new one."""
    monkeypatch.setattr(channel, "KEEPALIVE_MS", 300)
    monkeypatch.setattr(channel, "PING_TIMEOUT_MS", 300)
    wires: list[Any] = []

    def freeze() -> None:
        wires[0].freeze()

    began = tell().snapshot().progress(0).then(0.1).then(freeze).then(30)
    server = serve(began, tell().after(1).snapshot().result().state("SUCCEEDED"))
    wires.append(wire(server.address))
    assert numbers(caller.events(wires[0].address, b"p", b"s")) == [1, 2, 3]


def test_stopping_server_says_when_to_come_back(caller: Any, serve: Any, tell: Any, aborted: Any) -> None:
    """RetryInfo is obeyed."""
    stopping = aborted(CODE.UNAVAILABLE, "stopping", STOPPING, RetryInfo(retry_delay=Duration(nanos=400_000_000)))
    told: list[float] = []
    began = tell().snapshot().then(lambda: told.append(time.monotonic())).then(stopping)
    went_on = tell().then(lambda: told.append(time.monotonic())).snapshot().result().state("SUCCEEDED")
    caller.result(serve(began, went_on).address, b"p", b"s")
    assert 0.4 <= told[1] - told[0] < 2


def test_first_call_to_a_stopping_server(caller: Any, serve: Any, tell: Any, aborted: Any) -> None:
    """A server that answers is one that can be waited for, even if it answers that it is stopping."""
    stopping = aborted(CODE.UNAVAILABLE, "stopping", STOPPING, RetryInfo(retry_delay=Duration(nanos=1_000_000)))
    server = serve(tell().then(stopping), tell().whole())
    assert caller.result(server.address, b"p", b"s").iteration == 4


def test_queue_that_filled_meanwhile(caller: Any, serve: Any, tell: Any, aborted: Any, broken: Any) -> None:
    """A request that is sent again may be refused for want of room, which its own job takes: it is tried again."""
    full = aborted(CODE.RESOURCE_EXHAUSTED, "the queue is full", RetryInfo(retry_delay=Duration(nanos=1_000_000)))
    server = serve(tell().then(broken), tell().then(full), tell().whole())
    assert caller.result(server.address, b"p", b"s").iteration == 4


def test_patience_ends(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """When nothing comes for `patience_s` the error names the job, which is left alone, whoever closes what."""
    server = serve(tell().snapshot().progress(0).then(broken), tell().then(broken))
    caller.settings["patience_s"] = 0.3
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="jobs/j1 may still be running") as caught:
        caller.events(server.address, b"p", b"s")
    assert 0.15 < time.monotonic() - began < 2
    assert caught.value.job is not None
    assert caught.value.job.name == "jobs/j1"
    assert len(server.asked("WatchJob")) >= 3
    assert server.asked("CancelJob") == []


def test_patience_with_a_server_that_fails_each_time(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """A server that dies of this job gets as far as the snapshot each time: that is no reason to hope."""
    server = serve(tell().snapshot().then(broken))
    caller.settings["patience_s"] = 0.3
    with pytest.raises(UnavailableError):
        caller.events(server.address, b"p", b"s")
    assert 3 <= len(server.calls) < 40


def test_patience_begins_anew_with_every_event(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """A line that breaks again and again is patiently followed, as long as something comes: a heartbeat is enough."""
    stories = [tell().snapshot().progress(0).then(broken)]
    stories += [tell().after(1).snapshot().then(0.1).event(heartbeat={}).then(broken) for _ in range(6)]
    server = serve(*stories, tell().after(1).snapshot().result().state("SUCCEEDED"))
    caller.settings["patience_s"] = 0.3
    events = caller.events(server.address, b"p", b"s")
    assert [type(event) for event in events] == [Snapshot, Progress, Result, StateChange]


def test_who_asks_is_told_of_the_connection(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """`on_connection` hears each vain attempt, and once that all is well again."""
    server = serve(tell().snapshot().progress(0).then(broken), tell().then(broken), tell().after(1).whole())
    heard: list[Any] = []
    caller.settings["on_connection"] = heard.append
    caller.events(server.address, b"p", b"s")
    assert [type(error) for error in heard] == [UnavailableError, UnavailableError, type(None)]


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pause is about twice the one before, up to a bound, and no two clients keep step."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 4.0)

    class Broken(grpc.RpcError):
        def code(self) -> Any:
            return CODE.UNAVAILABLE

        def details(self) -> str:
            return "Socket closed"

        def trailing_metadata(self) -> Any:
            return ()

    def pauses() -> list[float]:
        patience = retry.Patience(retry.Connection("here", patience_s=60, on_connection=None))
        return [patience.pause_s(Broken()) for _ in range(8)]

    bounds = [0.2, 0.4, 0.8, 1.6, 3.2, 4, 4, 4]
    first, second = pauses(), pauses()
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(first, bounds, strict=True))
    assert first != second


# Leaving


def test_cancel_before_the_first_event(serve: Any, tell: Any) -> None:
    """A job whose name has not arrived is found by its request, and cancelled nevertheless."""
    server = serve(tell().then(30))
    with Client(server.address) as client:
        stylization = client.stylize(b"p", b"s", request_id="mine")
        while not server.requests:
            time.sleep(0.01)
        stylization.cancel()
        assert list(stylization) == []
        with pytest.raises(JobCancelledError):
            stylization.result()
    assert [request.name for request in server.asked("CancelJob")] == ["jobs/j1"]


async def test_async_cancel_before_the_first_event(serve: Any, tell: Any) -> None:
    """A job whose name has not arrived is found by its request, under asyncio too."""
    server = serve(tell().then(30))
    async with AsyncClient(server.address) as client, client.stylize(b"p", b"s", request_id="mine"):
        while not server.requests:
            await asyncio.sleep(0.01)
    assert [request.name for request in server.asked("CancelJob")] == ["jobs/j1"]


def test_cancel_that_cannot_be_told(serve: Any, tell: Any) -> None:
    """`cancel` says when the server did not hear it; `close` and `with` do not."""
    server = serve(tell().snapshot().then(30))
    with Client(server.address) as client:
        with client.stylize(b"p", b"s") as left, client.stylize(b"p", b"s") as cancelled:
            next(left)
            next(cancelled)
            server.grpc_server.stop(grace=0).wait(5)
            with pytest.raises(UnavailableError):
                cancelled.cancel()
        assert list(left) == []


def test_cancel_while_reconnecting(serve: Any, tell: Any, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the end of a pause in order to leave."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 30)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 30)
    server = serve(tell().snapshot().then(broken))
    with Client(server.address) as client:
        stylization = client.stylize(b"p", b"s")
        next(stylization)
        threading.Timer(0.2, stylization.cancel).start()
        assert list(stylization) == []
    assert server.cancelled.is_set()


async def test_async_cancel_while_reconnecting(
    serve: Any, tell: Any, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the end of a pause in order to leave, under asyncio too."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 30)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 30)
    server = serve(tell().snapshot().then(broken))
    async with AsyncClient(server.address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.stylize(b"p", b"s").result()
    assert server.cancelled.is_set()


def test_closing_the_client_while_reconnecting(
    serve: Any, tell: Any, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is closed waits for nothing any more: not for streams, not for calls."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 30)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 30)
    server = serve(tell().snapshot().then(broken), tell().then(broken))
    client = Client(server.address)
    stylization = client.stylize(b"p", b"s")
    next(stylization)
    threading.Timer(0.2, client.close).start()
    with pytest.raises(JobCancelledError, match="the client was closed"):
        stylization.result()
    assert server.cancelled.is_set()


def test_time_limit_passes_while_reconnecting(
    caller: Any, serve: Any, tell: Any, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout_s` bounds the whole, pauses included, and the job is cancelled."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 30)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 30)
    server = serve(tell().snapshot().then(broken), tell().snapshot().then(30))
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="jobs/j1 took longer"):
        caller.result(server.address, b"p", b"s", timeout_s=0.4)
    assert time.monotonic() - began < 5
    assert server.cancelled.is_set()


def test_detach(serve: Any, tell: Any) -> None:
    """`detach` hangs up and leaves the job, which it returns; who asks for the result is told where it is."""
    server = serve(tell().snapshot().state("RUNNING").then(30))
    with Client(server.address) as client, client.stylize(b"p", b"s") as stylization:
        next(stylization)
        assert stylization.detach().name == "jobs/j1"
        assert server.hung_up.wait(5)
        assert list(stylization) == []
        with pytest.raises(ClientClosedError, match="jobs/j1 was closed before the job ended; the job goes on"):
            stylization.result()
    gc.collect()
    assert not server.cancelled.wait(0.2)


async def test_async_detach(serve: Any, tell: Any) -> None:
    """`detach` does the same under asyncio, and waits for a job that has not been created yet."""
    server = serve(tell().then(0.2).snapshot().then(30))
    async with AsyncClient(server.address) as client, client.stylize(b"p", b"s") as stylization:
        assert (await stylization.detach()).name == "jobs/j1"
        assert [event async for event in stylization] == []
    assert not await asyncio.to_thread(server.cancelled.wait, 0.2)


def test_detach_before_the_first_event(serve: Any, tell: Any, aborted: Any) -> None:
    """`detach` waits until there is a job; if there will be none it raises what iterating would."""
    with Client(serve(tell().then(0.2).snapshot().then(30)).address) as client:
        assert client.stylize(b"p", b"s").detach().name == "jobs/j1"
    server = serve(tell().then(aborted(CODE.INVALID_ARGUMENT, "no")))
    with Client(server.address) as client, pytest.raises(InvalidArgumentError):
        client.stylize(b"p", b"s").detach()


# Watching


def test_watching(caller: Any, serve: Any, tell: Any) -> None:
    """A job is watched by its name, from any event on, with its own choice of frames; closing does nothing to it."""
    server = serve(tell().after(3).snapshot(state="RUNNING").progress(2).then(0.2).result().state("SUCCEEDED"))
    events = caller.watched(server.address, "j1", after_sequence=3, preview=NO_PREVIEW)
    assert numbers(events) == [4, 5, 6]
    expected = style_transfer_service_pb2.WatchJobRequest(name="jobs/j1", after_sequence=3)
    expected.preview.interval = 0
    assert server.calls == [expected]


def test_watching_goes_on_after_a_break(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """A break before the first event, and one after: the same call again, and one that goes on."""
    server = serve(
        tell().then(broken),
        tell().after(3).snapshot().progress(2).then(broken),
        tell().after(4).snapshot().result().state("SUCCEEDED"),
    )
    events = caller.watched(server.address, "jobs/j1", after_sequence=3)
    assert [type(event) for event in events] == [Snapshot, Progress, Result, StateChange]
    assert [watch.after_sequence for watch in server.asked("WatchJob")] == [3, 3, 4]


def test_who_watches_leaves_the_job_alone(serve: Any, tell: Any) -> None:
    """However a watcher leaves, the job goes on: by `with`, by time, by the client's end, or forgotten."""
    server = serve(tell().snapshot().then(30))
    with Client(server.address) as client:
        with client.watch_job("j1") as watching:
            next(watching)
        with pytest.raises(DeadlineExceededError):
            client.watch_job("j1", timeout_s=0.2).result()
        next(client.watch_job("j1"))
        gc.collect()
        last = client.watch_job("j1")
        next(last)
    with pytest.raises(ClientClosedError):
        last.result()
    assert not server.cancelled.wait(0.2)


def test_watcher_cancels_if_it_wants(serve: Any, tell: Any) -> None:
    """`cancel` of a watching stream is about the job."""
    server = serve(tell().snapshot().then(30))
    with Client(server.address) as client:
        watching = client.watch_job("j1")
        watching.cancel()
        with pytest.raises(JobCancelledError):
            watching.result()
    assert [request.name for request in server.asked("CancelJob")] == ["jobs/j1"]


def test_watching_after_an_interrupt(serve: Any, tell: Any) -> None:
    """Ctrl-C stops the watching and not the job, and the same stream may be read on."""
    server = serve(
        tell().snapshot().progress(0).then(30), tell().after(1).snapshot().progress(1).result().state("SUCCEEDED")
    )
    with Client(server.address) as client:
        watching = client.watch_job("j1")
        events = [next(watching), next(watching)]
        threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            next(watching)
        events += list(watching)
        assert watching.result().iteration == 4
    assert numbers(events) == [1, 2, 3, 4]
    assert not server.cancelled.is_set()


@pytest.mark.parametrize("number", [-1, True, "3", 1.5, 2**63])
def test_wrong_number_to_watch_from(number: Any) -> None:
    """The number is named with its bound before anything is sent."""
    with Client("localhost:1") as client, pytest.raises(InvalidArgumentError, match="after_sequence must be a whole"):
        client.watch_job("j1", after_sequence=number)


def test_result_that_came_before(caller: Any, serve: Any, tell: Any, picture: Any) -> None:
    """The result of a job that is watched from its end on is fetched from where it is kept."""
    data = picture()
    kept = {"image": f"images/{hashlib.sha256(data).hexdigest()}", "iteration": 4, "loss": 0.5}
    ended = tell().job("SUCCEEDED", sequence=9, attempt=2, result={**kept, "stop_reason": "STOP_REASON_FINISHED"})
    ended.end_time.FromSeconds(1_700_000_100)
    server = serve(tell().after(9).event(snapshot=ended), Library(data))

    def sync_result() -> Result:
        with Client(server.address) as client:
            return client.watch_job("j1", after_sequence=9).result()

    async def async_result() -> Result:
        async with AsyncClient(server.address) as client:
            return await client.watch_job("j1", after_sequence=9).result()

    for result in (sync_result(), asyncio.run(async_result())):
        assert (result.data, result.iteration, result.sequence, result.attempt) == (data, 4, 8, 2)
        assert result.stop_reason is StopReason.FINISHED


# Jobs


def test_create_job(caller: Any, serve: Any, tell: Any) -> None:
    """A job is created by the same arguments as a stylization, and comes back as the server has it."""
    server = serve(tell().whole())
    job = caller.call(server.address, "create_job", b"p", b"s", iterations=3, request_id="mine")
    assert (job.name, job.state, job.request_id, job.result, job.attempt) == ("jobs/j1", "queued", "mine", None, 0)
    (request,) = server.requests
    assert (request.content.data, request.options.iterations, request.request_id) == (b"p", 3, "mine")
    assert not request.cancel_on_disconnect


def test_create_job_is_tried_again(caller: Any, serve: Any, tell: Any, broken: Any) -> None:
    """An answer that was lost is asked for again, by the same name."""
    server = serve(tell().then(broken), tell().whole())
    assert caller.call(server.address, "create_job", b"p", b"s").name == "jobs/j1"
    first, second = server.requests
    assert first == second


def test_request_id_of_another_request(caller: Any, serve: Any, tell: Any, aborted: Any) -> None:
    """What stands for another request is the caller's mistake."""
    server = serve(tell().then(aborted(CODE.ALREADY_EXISTS, "request_id 'mine' belongs to job j2")))
    with pytest.raises(AlreadyExistsError, match="belongs to job j2"):
        caller.call(server.address, "create_job", b"p", b"s", request_id="mine")


def test_jobs_are_got_changed_and_ended(caller: Any, serve: Any, tell: Any) -> None:
    """Every method takes a job or its name, with or without the collection."""
    server = serve(tell().whole())
    job = caller.call(server.address, "get_job", "j1")
    assert isinstance(job, Job)
    assert caller.call(server.address, "update_job", job, paused=True, iterations=9).state is JobState.PAUSED
    assert caller.call(server.address, "update_job", "jobs/j1", finish=True).state is JobState.PAUSED
    assert caller.call(server.address, "cancel_job", "j1").state is JobState.CANCELLED
    assert caller.call(server.address, "delete_job", job) is None
    assert {request.name for request in server.calls} == {"jobs/j1"}
    pause, finish = server.asked("UpdateJob")
    assert (pause.paused, pause.options.iterations, pause.finish) == (True, 9, False)
    assert (finish.HasField("paused"), finish.HasField("options"), finish.finish) == (False, False, True)
    with pytest.raises(UnknownOptionError):
        caller.call(server.address, "update_job", "j1", iteration=9)


class Forgetful(style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
    """Does what it is asked for; the first answers about its job get lost, `lost` of them."""

    def __init__(self, lost: int, state: str = "SUCCEEDED") -> None:
        self.lost = lost
        self.is_there = True
        self.job = job_pb2.Job(name="jobs/j1", state="JOB_STATE_RUNNING", model="models/tiny")
        self._state = f"JOB_STATE_{state}"

    def GetJob(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        """Return the job."""
        return self.job

    def DeleteJob(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        """Delete the job."""
        if not self.is_there:
            context.abort(CODE.NOT_FOUND, "name: there is no job 'j1'")
        self.is_there = False
        self._lose(context)
        return Empty()

    def UpdateJob(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        """Let the job end."""
        if self.job.state == self._state_number:
            context.abort(CODE.FAILED_PRECONDITION, "jobs/j1 has ended and changes no more")
        self.job.state = self._state_number
        self._lose(context)
        return self.job

    @property
    def _state_number(self) -> int:
        return int(job_pb2.JobState.Value(self._state))

    def _lose(self, context: grpc.ServicerContext) -> None:
        if self.lost:
            self.lost -= 1
            context.abort(CODE.UNAVAILABLE, "Socket closed")


def test_a_deletion_whose_answer_was_lost_has_succeeded(caller: Any, serve: Any) -> None:
    """What its repetition does not find any more is what it has deleted."""
    servicer = Forgetful(lost=1)
    assert caller.call(serve(servicer).address, "delete_job", "j1") is None
    assert not servicer.is_there


def test_a_deletion_of_what_was_never_there_is_an_error(caller: Any, serve: Any) -> None:
    """Whoever hears at the first time that there is nothing is told so; also if the server was not there before."""
    servicer = Forgetful(lost=0)
    servicer.is_there = False
    with pytest.raises(NotFoundError) as caught:
        caller.call(serve(servicer).address, "delete_job", "j1")
    assert not caught.value.is_repeated


def test_a_deletion_that_never_arrived_before_is_not_a_repetition(serve: Any) -> None:
    """A server that was away has deleted nothing: when it is back and has no such job, that is an error."""
    there = Forgetful(lost=0)
    first = serve(there)
    with Client(first.address) as client:
        client.get_job("j1")
        first.grpc_server.stop(grace=0).wait(5)
        there.is_there = False
        later = threading.Timer(0.5, lambda: serve(there, port=int(first.address.rpartition(":")[2])))
        later.start()
        try:
            with pytest.raises(NotFoundError):
                client.delete_job("j1")
        finally:
            later.join()


def test_enough_whose_answer_was_lost_has_succeeded(caller: Any, serve: Any) -> None:
    """A job that was to finish, and has ended with its picture when asked again, did what it was told."""
    job = caller.call(serve(Forgetful(lost=1)).address, "update_job", "j1", finish=True)
    assert job.state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("lost", "state", "update"),
    [
        (1, "CANCELLED", {"finish": True}),
        (1, "FAILED", {"finish": True}),
        (1, "SUCCEEDED", {"paused": True}),
        (0, "SUCCEEDED", {"finish": True}),
    ],
)
def test_a_change_of_a_job_that_ended_otherwise_is_an_error(
    caller: Any, serve: Any, lost: int, state: str, update: dict[str, bool]
) -> None:
    """Whether or not an answer was lost: without a picture, or wanted to wait, or ended before it was asked."""
    servicer = Forgetful(lost, state)
    if not lost:
        servicer.job.state = job_pb2.JOB_STATE_SUCCEEDED
    with pytest.raises(FailedPreconditionError) as caught:
        caller.call(serve(servicer).address, "update_job", "j1", **update)
    assert caught.value.is_repeated is bool(lost)


class ManyJobs(style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
    """Has five jobs, told two a page; one is in a state that is newer than this client."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def ListJobs(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        """Return a page."""
        self.requests.append(style_transfer_service_pb2.ListJobsRequest.FromString(request.SerializeToString()))
        jobs = [job_pb2.Job(name=f"jobs/j{number}", state=number) for number in (1, 2, 3, 4, 77)]
        begin = int(request.page_token or 0)
        token = str(begin + 2) if begin + 2 < len(jobs) else ""
        return style_transfer_service_pb2.ListJobsResponse(jobs=jobs[begin : begin + 2], next_page_token=token)


def test_jobs_are_listed_page_after_page(caller: Any, serve: Any) -> None:
    """All pages are fetched; states are asked for by name; a state that is not known is `unknown`."""
    jobs = ManyJobs()
    server = serve(jobs)
    listed = caller.call(server.address, "list_jobs", ["running", JobState.PAUSED])
    assert [job.name for job in listed] == ["jobs/j1", "jobs/j2", "jobs/j3", "jobs/j4", "jobs/j77"]
    assert [job.state for job in listed] == ["queued", "running", "succeeded", "failed", "unknown"]
    assert not listed[-1].state.is_terminal
    assert [list(request.states) for request in jobs.requests] == [[2, 6]] * 3
    with pytest.raises(InvalidArgumentError, match=r"states\[0\] must be one of queued, .*, paused, not 'asleep'"):
        caller.call(server.address, "list_jobs", "asleep")


# Images


class Library(image_service_pb2_grpc.ImageServiceServicer):
    """Keeps images, and fails as it is told to."""

    def __init__(self, *kept: bytes) -> None:
        self.images = {name_of(data): data for data in kept}
        self.uploads: dict[str, tuple[Any, bytearray]] = {}
        self.calls: list[Any] = []
        self.faults: dict[int, Any] = {}
        """What to do at the call of that number: raise before it is served, or say that it was not after it was."""
        self.flipped = False

    def CreateUpload(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Begin an upload."""
        return self._served(request, context, self._create)

    def WriteUpload(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Take a part."""
        return self._served(request, context, self._write)

    def GetUpload(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Tell how far it is."""
        return self._served(request, context, self._get)

    def GetImage(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Describe an image."""
        if request.name not in self.images:
            context.abort(CODE.NOT_FOUND, f"name: there is no image {request.name!r}")
        size = len(self.images[request.name])
        return image_service_pb2.StoredImage(name=request.name, total_bytes=size, width=8, height=6)

    def DownloadImage(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        """Send an image in parts of five bytes, and break off where it is told to."""
        from tests.client.conftest import parts_of

        data = self.images[request.name]
        self.calls.append(request)
        for part in parts_of(data, "PNG", -(-len(data) // 5)):
            if part.offset >= request.offset:
                if self.faults.pop(part.offset, None):
                    context.abort(CODE.UNAVAILABLE, "Socket closed")
                if self.flipped:
                    part.data = bytes(len(part.data))
                yield part

    def _served(self, request: Any, context: grpc.ServicerContext, serve: Callable[[Any, Any], Any]) -> Any:
        self.calls.append(request)
        fault = self.faults.get(len(self.calls))
        if fault == "before":
            context.abort(CODE.UNAVAILABLE, "Socket closed")
        if fault == "forget":
            self.uploads.clear()
        if fault == "behind":
            next(iter(self.uploads.values()))[1].clear()
        answer = serve(request, context)
        if fault == "after":
            context.abort(CODE.UNAVAILABLE, "Socket closed")
        return answer

    def _create(self, request: Any, _: Any) -> Any:
        name = f"images/{request.sha256}"
        if name in self.images:
            size = request.total_bytes
            return image_service_pb2.Upload(name="uploads/done", total_bytes=size, received_bytes=size, image=name)
        upload = image_service_pb2.Upload(name=f"uploads/{len(self.calls)}", total_bytes=request.total_bytes)
        self.uploads[upload.name] = (upload, bytearray())
        return upload

    def _get(self, request: Any, context: Any) -> Any:
        if request.name not in self.uploads:
            context.abort(CODE.NOT_FOUND, f"name: there is no upload {request.name!r}")
        upload, data = self.uploads[request.name]
        upload.received_bytes = len(data)
        return upload

    def _write(self, request: Any, context: Any) -> Any:
        upload = self._get(request, context)
        data = self.uploads[upload.name][1]
        if request.offset > len(data):
            context.abort(CODE.OUT_OF_RANGE, f"offset: only {len(data)} bytes are here")
        data[request.offset :] = request.data
        if len(data) == upload.total_bytes:
            del self.uploads[upload.name]
            if bytes(data).startswith(b"no image"):
                context.abort(CODE.INVALID_ARGUMENT, "data is not an image file")
            upload.image = name_of(bytes(data))
            self.images[upload.image] = bytes(data)
        return self._get(request, context) if upload.name in self.uploads else upload

    def written(self) -> list[tuple[int, int]]:
        """Return where the parts that arrived began, and their lengths."""
        writes = [call for call in self.calls if isinstance(call, image_service_pb2.WriteUploadRequest)]
        return [(write.offset, len(write.data)) for write in writes]


def name_of(data: bytes) -> str:
    """Return the name of an image file on a server."""
    return f"images/{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Return an empty library, to which files go in parts of four bytes."""
    monkeypatch.setattr(transfers, "PART_BYTES", 4)
    return Library()


def test_upload(caller: Any, serve: Any, library: Library) -> None:
    """A file goes up in parts, once: the second time the server has it."""
    server = serve(library)
    stored = caller.call(server.address, "upload_image", b"0123456789")
    assert (stored.name, stored.total_bytes, stored.width) == (name_of(b"0123456789"), 10, 8)
    assert library.written() == [(0, 4), (4, 4), (8, 2)]
    caller.call(server.address, "upload_image", b"0123456789")
    assert len(library.written()) == 3


FAULTS: dict[str, dict[int, str]] = {
    "the first answer is lost": {1: "after"},
    "a part is lost": {3: "before"},
    "the answer to a part is lost": {3: "after"},
    "the answer to the last part is lost": {4: "after"},
    "the upload is lost": {3: "forget"},
    "another server is behind": {3: "behind"},
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_interrupted_upload_goes_on(caller: Any, serve: Any, library: Library, faults: dict[int, str]) -> None:
    """Whatever is lost, the file arrives whole, and what had arrived is not sent again without need."""
    library.faults = faults
    server = serve(library)
    assert caller.call(server.address, "upload_image", b"0123456789").name == name_of(b"0123456789")
    again = {"forget", "behind"} & set(faults.values())
    assert len(library.written()) <= (6 if again else 4)


def test_uploads_that_are_always_lost(caller: Any, serve: Any, library: Library) -> None:
    """A server that loses every upload is not tried for ever."""
    library.faults = dict.fromkeys(range(2, 50, 2), "forget")
    with pytest.raises(BrokenStreamError, match="the server lost an upload of 10 bytes 3 times"):
        caller.call(serve(library).address, "upload_image", b"0123456789")


def test_upload_of_what_is_no_image(caller: Any, serve: Any, library: Library) -> None:
    """What the server refuses is raised, and not sent again."""
    with pytest.raises(InvalidArgumentError, match="not an image file"):
        caller.call(serve(library).address, "upload_image", b"no image at all")
    assert len(library.written()) == 4


def test_large_requests_are_uploaded_before(
    caller: Any, serve: Any, story: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images for which a message has no room go up in parts, the largest first, and the request names them."""
    monkeypatch.setattr(requests, "MAX_REQUEST_BYTES", 300)
    monkeypatch.setattr(transfers, "PART_BYTES", 100)
    server = serve(story.whole(), library)
    mask, style = bytes([1]) * 250, bytes([2]) * 150
    styles = [StyleInput(style, region=mask), StyleInput(style)]
    assert caller.result(server.address, b"photo", styles, init_image=b"start").iteration == 4
    assert caller.call(server.address, "create_job", b"photo", styles).name == "jobs/j1"
    for request in server.requests:
        assert (request.content.data, request.styles[0].region.name) == (b"photo", name_of(mask))
        assert request.styles[0].image.name == name_of(style)
        assert not request.styles[0].HasField("style_region")
    assert server.requests[0].init_image.data == b"start"
    assert set(library.images) == {name_of(mask), name_of(style)}
    with pytest.raises(InvalidArgumentError, match="content: data is not an image file") as caught:
        caller.call(server.address, "create_job", b"no image" * 100, b"s")
    assert caught.value.field == "content"


def test_images_on_the_server_are_named(caller: Any, serve: Any, story: Any) -> None:
    """A name, a stored image, another job's result, and a picture that came, wherever an image can be."""
    kept = JobResult(image="images/r", total_bytes=1, iteration=1, loss=0.0, stop_reason=StopReason.FINISHED)
    server = serve(story.whole())
    made = caller.result(server.address, b"p", b"s")
    styles = [StyleInput(ImageName("images/s"), region=kept, style_region=ImageName("images/m")), made]
    caller.result(server.address, kept, styles, init_image=ImageName("images/i"))
    request = server.requests[1]
    first, second = request.styles
    assert (request.content.name, request.init_image.name) == ("images/r", "images/i")
    assert (first.image.name, first.region.name, first.style_region.name) == ("images/s", "images/r", "images/m")
    assert second.image.data == made.data


def test_download_goes_on_where_it_broke(caller: Any, serve: Any) -> None:
    """A file that breaks off is fetched from there on, and is whole in the end."""
    data = b"0123456789abcdefghij"
    library = Library(data)
    library.faults = {10: True, 15: True}
    picture = caller.call(serve(library).address, "download_image", ImageName(name_of(data)))
    assert (picture.data, picture.format, picture.width) == (data, "png", 8)
    assert [request.offset for request in library.calls] == [0, 10, 15]


def test_damaged_download(caller: Any, serve: Any) -> None:
    """A file that is not what its name says is refused, be it damaged or another one."""
    library = Library(b"0123456789")
    server = serve(library)
    library.images["images/" + "0" * 64] = b"another"
    with pytest.raises(BrokenStreamError, match="arrived as another file"):
        caller.call(server.address, "download_image", "images/" + "0" * 64)
    library.flipped = True
    with pytest.raises(BrokenStreamError, match="arrived damaged"):
        caller.call(server.address, "download_image", name_of(b"0123456789"))
    with pytest.raises(InvalidArgumentError, match="image must be the name of an image on the server, not bytes"):
        caller.call(server.address, "download_image", b"0123456789")


def test_image_that_is_not_there(caller: Any, serve: Any) -> None:
    """An image that is not there, or no longer, is NotFoundError."""
    with pytest.raises(NotFoundError, match="there is no image 'images/x'"):
        caller.call(serve(Library()).address, "get_image", "images/x")
