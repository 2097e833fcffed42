"""Iterations recorded once and replayed, with a stand-in for CUDA's recorder where there is no GPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nst_model import FeatureModel, Iterate, Style, StylizeOptions, graphs
from nst_model.descent import AHEAD, Recordings
from nst_model.graphs import WARM_UP, Recorded, Work
from nst_model.memory import peak_bytes
from nst_model.stylization import Stylization
from tests.model.test_resume import RUNS, same

Picture = Callable[[int, int, int], Tensor]


class Tape(TorchDispatchMode):
    """Notes each operation with the tensors that it reads and writes, and does it again on the same memory.

    Like a CUDA graph: whatever Python does between the operations, or keeps in attributes, is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map(_alias, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        made = [_alias(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
        before = {t.untyped_storage().data_ptr() for t in tree_leaves(given) if isinstance(t, Tensor)}
        # A view is of memory that others write.
        if func._schema.is_mutable or any(t.untyped_storage().data_ptr() not in before for t in made):
            self._operations.append((func, given, made))
        return result

    def replay(self) -> None:
        """Do it again."""
        for func, given, made in self._operations:
            args, kwargs = tree_map(_alias, given)
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            if not func._schema.is_mutable:
                for old, new in zip(made, again, strict=True):
                    old.copy_(new)


def _alias(value: Any) -> Any:
    """Return a tensor of the same memory that keeps its shape, whatever becomes of the other's."""
    return value.detach() if isinstance(value, Tensor) else value


class Replaying:
    """A recorder as CUDA's, by a tape. To record does the work, unlike there, so it is undone."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Work, device: torch.device) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        assert isinstance(work, functools.partial)
        optimizer = work.args[1]
        assert optimizer.x.device == device
        before = optimizer.state()
        tape = Tape()
        with tape:
            vector = work()
        optimizer.restore(before)
        vector.fill_(float("nan"))

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, vector


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Replaying:
    """The stand-in, in place of no recorder for the CPU."""
    recorder = Replaying()
    monkeypatch.setattr(graphs, "RECORDERS", {**graphs.RECORDERS, "cpu": recorder})
    return recorder


def run(model: FeatureModel, picture: Picture, preset: str = "fine", **options: Any) -> Stylization:
    """Return a small run, always of the same pictures."""
    styles = [Style(picture(40, 48, 2))]
    return Stylization(model, picture(40, 48, 1), styles, StylizeOptions.of(preset, **options))


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_is_the_same_to_the_bit(
    tiny_model: FeatureModel,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
    recorder: Replaying,
    name: str,
    ahead: int,
) -> None:
    """Read late or not; one recording at each scale that has the iterations for it."""
    monkeypatch.setitem(AHEAD, "cpu", ahead)
    recorded = list(run(tiny_model, picture, **RUNS[name]))
    assert recorder.recorded > 0
    assert recorder.replayed > 0
    monkeypatch.setattr(graphs, "RECORDERS", {})
    plain = list(run(tiny_model, picture, **RUNS[name]))
    assert len(recorded) == len(plain)
    assert all(map(same, recorded, plain))


def test_a_recording_serves_one_objective_and_one_optimizer(
    tiny_model: FeatureModel, picture: Picture, monkeypatch: pytest.MonkeyPatch, recorder: Replaying
) -> None:
    """Steered, the run is recorded anew if it then has other layers; by other weights and budgets it is not."""

    def steered() -> list[Iterate]:
        making, seen = run(tiny_model, picture, iterations=20, first_size_px=512), []
        for iterate in making:
            seen.append(iterate)
            if iterate.index == 6:
                making.steer(iterations=18)
            if iterate.index == 8:
                making.steer(content_weight=0.5, style_layers={**making.options.style_layers, "relu2_1": 3.0})
            if iterate.index == 12:
                making.steer(content_layers={"relu3_1": 1.0})
        return seen

    with_recordings = steered()
    assert recorder.recorded == 2
    assert recorder.replayed == 19 - 2 * WARM_UP
    monkeypatch.setattr(graphs, "RECORDERS", {})
    assert all(itertools.starmap(same, zip(with_recordings, steered(), strict=True)))


def jobs(picture: Picture, *, apart: bool = False) -> list[tuple[Tensor, list[Style], dict[str, Any]]]:
    """Return jobs of one form: other photographs, styles, weights, starts and budgets; `apart`, in other regions."""
    photo, style, other = picture(40, 48, 1), picture(40, 48, 2), picture(30, 50, 3)
    if apart:
        left = (torch.arange(48) < 20).float().expand(40, 48)
        return [
            (photo, [Style(style, region=left), Style(other)], {"iterations": 8}),
            (photo, [Style(other, region=1 - left.flip(1)), Style(style)], {"iterations": 8}),
        ]
    return [
        (photo, [Style(style)], {"iterations": 8}),
        (other[:, :, :48].repeat(1, 2, 1)[:, :40], [Style(other, 2.0), Style(style)], {"iterations": 9, "seed": 3}),
        (photo, [Style(other)], {"iterations": 6, "style_weight": 0.5, "tv_weight": 3, "init": "noise"}),
    ]


def done(model: FeatureModel, job: tuple[Tensor, list[Style], dict[str, Any]], **options: Any) -> list[Iterate]:
    """Do a job, from coarse to fine."""
    content, styles, own = job
    return list(
        Stylization(model, content, styles, StylizeOptions(**{"first_size_px": 34, "history": 5, **own, **options}))
    )


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"style_loss": "gram", "optimizer": "adam"}, {"style_loss": "direct"}, {"content_loss": "self_similarity"}],
    ids=["fine", "adam", "direct", "self_similarity"],
)
def test_a_recording_serves_the_next_job_of_its_form(
    tiny_model: FeatureModel,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
    recorder: Replaying,
    options: dict[str, Any],
    apart: bool,
) -> None:
    """Once for each size is enough; every job is the same to the bit as if nothing were recorded."""
    model = FeatureModel(tiny_model.weights, "cpu")
    recorded = [done(model, job, **options) for job in jobs(picture, apart=apart)]
    assert recorder.recorded == 2
    monkeypatch.setattr(graphs, "RECORDERS", {})
    for iterates, job in zip(recorded, jobs(picture, apart=apart), strict=True):
        assert all(itertools.starmap(same, zip(iterates, done(tiny_model, job, **options), strict=True)))


@pytest.mark.parametrize(
    "changes",
    [{"style_loss": "gram"}, {"history": 7}, {"tv_norm": "l1"}, {"pooling": "l2"}, {"deterministic": True}],
    ids=str,
)
def test_a_job_of_another_form_is_recorded_anew(
    tiny_model: FeatureModel, picture: Picture, monkeypatch: pytest.MonkeyPatch, recorder: Replaying, changes: Any
) -> None:
    """Whatever is not in a tensor that can be filled with other numbers makes another form."""
    model, job = FeatureModel(tiny_model.weights, "cpu"), jobs(picture)[0]
    done(model, job)
    changed = done(model, job, **changes)
    assert recorder.recorded == 4
    monkeypatch.setattr(graphs, "RECORDERS", {})
    assert all(itertools.starmap(same, zip(changed, done(tiny_model, job, **changes), strict=True)))


def test_runs_that_take_turns_have_recordings_of_their_own(
    tiny_model: FeatureModel, picture: Picture, monkeypatch: pytest.MonkeyPatch, recorder: Replaying
) -> None:
    """Of one model: neither disturbs the other, one with new weights on the way included."""
    model = FeatureModel(tiny_model.weights, "cpu")

    def turns() -> list[list[Iterate]]:
        runs = [run(model, picture, iterations=12, first_size_px=512, init=init) for init in ("content", "noise")]
        found: list[list[Iterate]] = [[], []]
        for iterates in itertools.zip_longest(*runs):
            for iterate, so_far in zip(iterates, found, strict=True):
                so_far.append(iterate)
            if iterates[0].index == 5:
                runs[0].steer(content_weight=0.5)
        return found

    list(run(model, picture, iterations=12, first_size_px=512))
    recorded = turns()
    assert recorder.recorded > 1
    monkeypatch.setattr(graphs, "RECORDERS", {})
    for with_recordings, plain in zip(recorded, turns(), strict=True):
        assert all(itertools.starmap(same, zip(with_recordings, plain, strict=True)))


def test_nothing_is_left_where_there_is_no_room(
    tiny_model: FeatureModel, picture: Picture, recorder: Replaying
) -> None:
    """A recording holds memory: those of a job, and what the next one does first, may not take more than there is."""
    weights, (job, *_) = tiny_model.weights, jobs(picture)
    peak = peak_bytes(StylizeOptions(first_size_px=34, history=5), 40, 48, weights.architecture)
    for limit, count in ((3 * peak, 2), (3 * peak - 1, 4)):
        model, before = FeatureModel(weights, "cpu", limit), recorder.recorded
        done(model, job)
        done(model, job)
        assert recorder.recorded - before == count, limit


def test_what_a_job_of_another_kind_has_left_is_given_back(
    tiny_model: FeatureModel, picture: Picture, recorder: Replaying
) -> None:
    """Before it is looked at how much memory there is: of another size, and of another feature model."""
    left: list[weakref.ref[Tensor]] = []
    recordings = Recordings()
    first, second = (
        FeatureModel(dataclasses.replace(tiny_model.weights, sha256=sha256), "cpu", recordings=recordings)
        for sha256 in ("1" * 64, "2" * 64)
    )
    options, styles = StylizeOptions(first_size_px=34, history=5, iterations=8), [Style(picture(40, 48, 2))]
    for model, height in ((first, 40), (second, 40), (second, 39)):
        making = Stylization(model, picture(height, 48, 1), styles, options)
        assert not any(x() is not None for x in left)
        list(making)
        del making
        assert recorder.recorded == len(left) + 2
        loops = model.loops(options, height, 48)
        assert loops is not None
        assert len(loops) == 2
        left += [weakref.ref(loop.optimizer.x) for _, loop in loops.values()]
        del loops


def test_what_cannot_be_recorded_is_done_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried once, nothing is left out or done twice, and the log says why, in one line."""
    tried = []

    def refusing(*_: object) -> Any:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "RECORDERS", {"cpu": refusing})
    counter = torch.zeros(1)
    work = Recorded(lambda: counter.add_(1).clone(), torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        assert [float(work()) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert len(tried) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "an iteration cannot be recorded, and is launched kernel by kernel: "
        "operation not permitted when stream is capturing"
    ]


def test_a_vector_is_not_overwritten_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads late reads what was there."""
    counter, vector = torch.zeros(3), torch.zeros(3)

    def count() -> Tensor:
        return counter.add_(1) * 2

    monkeypatch.setattr(graphs, "RECORDERS", {"cpu": lambda work, _: (lambda: vector.copy_(work()), vector)})
    work = Recorded(count, torch.device("cpu"))
    vectors = [work() for _ in range(6)]
    assert [each.tolist() for each in vectors] == [[2.0 * call] * 3 for call in range(1, 7)]


class Cuda:
    """What PyTorch keeps of CUDA's current device and stream, for `torch.cuda.graph` as it is where there is no GPU.

    Attributes:
        device: the current one.
        stream: the current one.
        outcome: what the end of a recording does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.stream = 0, "default"
        self.outcome: Callable[[], object] = lambda: None
        cuda = self

        class Stream:
            def __init__(self, stream: str) -> None:
                self._stream = stream

            def __enter__(self) -> None:
                self._before, cuda.stream = cuda.stream, self._stream

            def __exit__(self, *_: object) -> None:
                cuda.stream = self._before

        class Graph:
            replay = None

            def capture_begin(self, **_: object) -> None:
                """Begin."""

            def capture_end(self) -> None:
                cuda.outcome()

        monkeypatch.setattr(torch.cuda, "_exchange_device", self._exchange)
        monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", self._exchange)
        monkeypatch.setattr(torch.cuda, "stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(graphs, "_recording_stream", lambda device: f"recording on {device}")

    def _exchange(self, device: int) -> int:
        before, self.device = self.device, device
        return before

    @property
    def current(self) -> tuple[int, str]:
        """Device and stream."""
        return self.device, self.stream


def refused() -> None:
    """End as where something in a recording has waited for the device."""
    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def empty() -> None:
    """End as where nothing was launched on the stream that was recorded."""
    warnings.warn("The CUDA Graph is empty. This usually means that the graph was attempted", UserWarning, stacklevel=1)


def test_a_recording_is_made_on_the_devices_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever device is the current one, which it then is again."""
    cuda, seen = Cuda(monkeypatch), []

    def work() -> Tensor:
        seen.append(cuda.current)
        return torch.zeros(1)

    graphs.cuda_graph(work, torch.device("cuda", 1))
    assert seen == [(1, "recording on cuda:1")]
    assert cuda.current == (0, "default")


@pytest.mark.filterwarnings("default:The CUDA Graph is empty")
@pytest.mark.parametrize("outcome", [refused, empty])
def test_a_refused_recording_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, outcome: Callable[[], None]
) -> None:
    """Work goes on where it was, as it is; an empty recording counts as refused; none is tried again."""
    cuda, seen = Cuda(monkeypatch), []
    cuda.outcome = outcome
    monkeypatch.setattr(graphs, "RECORDERS", {"cuda": graphs.cuda_graph})

    def work() -> Tensor:
        seen.append(cuda.current)
        return torch.zeros(1)

    device = torch.device("cuda", 1)
    for _ in range(2):
        recorded = Recorded(work, device)
        for _ in range(WARM_UP + 2):
            recorded()
    assert seen.count((1, "recording on cuda:1")) == 1
    assert seen.count((0, "default")) == 2 * (WARM_UP + 2)
    assert len(caplog.records) == 1


def test_want_of_memory_refuses_no_other_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next picture may be smaller."""

    def short(*_: object) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(graphs, "RECORDERS", {"cpu": short})
    for _ in range(2):
        work = Recorded(lambda: torch.ones(1), torch.device("cpu"))
        assert work.possible
        assert [float(work()) for _ in range(4)] == [1.0] * 4
        assert not work.possible


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("loss", ["gram", "wasserstein", "sliced"])
def test_replay_and_eager_agree_on_a_gpu(
    tiny_model: FeatureModel,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    loss: str,
    optimizer: str,
) -> None:
    """As far as sums in another order let them, the next run on the same recordings included; none is refused."""
    model = FeatureModel(tiny_model.weights, "cuda")
    options = {"style_loss": loss, "optimizer": optimizer, "iterations": 12, "first_size_px": 34, "precision": "fp32"}
    recorded, again = ([iterate.loss for iterate in run(model, picture, **options)] for _ in range(2))
    assert not caplog.records
    monkeypatch.setattr(graphs, "RECORDERS", {})
    plain = [iterate.loss for iterate in run(model, picture, **options)]
    assert recorded == pytest.approx(plain, rel=0.01)
    assert again == pytest.approx(plain, rel=0.01)
