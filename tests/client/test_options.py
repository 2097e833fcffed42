"""Options by name, checked against the contract's descriptor."""

import inspect

import pytest

from nst.v1 import image_pb2, job_pb2, model_service_pb2, options_pb2
from nst_client import (
    Client,
    ImageFormat,
    InvalidArgumentError,
    JobState,
    ModelState,
    NstError,
    OptionType,
    StopReason,
    UnknownOptionError,
)
from nst_client.options import OPTIONS, choices, options_message, read_fields


def test_options_go_by_their_names() -> None:
    """Numbers, choices and layer weights land in the fields of their names; None leaves one out."""
    message = options_message(
        {"iterations": 0, "content_weight": 2, "init": "noise", "style_layers": {"relu1_1": 1}, "seed": None}
    )
    expected = options_pb2.StylizeOptions(
        iterations=0, content_weight=2.0, init=options_pb2.INIT_NOISE, style_layers={"relu1_1": 1.0}
    )
    assert message == expected
    assert message.HasField("iterations")
    assert not message.HasField("seed")


def test_options_read_back_as_they_were_given() -> None:
    """The options of a job have the form in which a caller gives them."""
    given = {"iterations": 7, "pooling": "average", "content_layers": {"relu4_2": 0.5}}
    given |= {"scale_iterations": [9, 5], "deterministic": False}
    assert read_fields(options_message(given)) == given


def test_no_default_is_restated() -> None:
    """A client that is told nothing says nothing: defaults are the server's."""
    assert options_message({}).ByteSize() == 0


def test_unknown_option_names_the_closest() -> None:
    """A misspelt option is an error that names the one that was meant, and a TypeError as Python's own would be."""
    with pytest.raises(UnknownOptionError, match="no option 'iteration': did you mean 'iterations'") as caught:
        options_message({"iteration": 3})
    assert (caught.value.closest, caught.value.field) == ("iterations", "options.iteration")
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, NstError)
    with pytest.raises(UnknownOptionError, match="there are size_px, iterations"):
        options_message({"qqq": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": "many"}, "iterations must be a whole number, not 'many'"),
        ({"iterations": 1.5}, "iterations must be a whole number, not 1.5"),
        ({"iterations": True}, "iterations must be a whole number, not True"),
        ({"iterations": 10**12}, "iterations must be a whole number, not 1000000000000"),
        ({"content_weight": "heavy"}, "content_weight must be a number, not 'heavy'"),
        ({"init": "nose"}, "init must be one of content, noise, gray, style_statistics, image, not 'nose'"),
        ({"init": "unspecified"}, "init must be one of content, .* not 'unspecified'"),
        ({"deterministic": "yes"}, "deterministic must be true or false, not 'yes'"),
        ({"scale_iterations": 5}, "scale_iterations must be a list, each a whole number, not 5"),
        ({"scale_iterations": [5, 1.5]}, "scale_iterations must be a list, each a whole number"),
        ({"style_layers": ["relu1_1"]}, "style_layers must be a dict from layer name to weight"),
        ({"style_layers": {"relu1_1": "x"}}, "style_layers must be a dict from layer name to weight"),
        ({"style_layers": {1: 1.0}}, "style_layers must be a dict from layer name to weight"),
    ],
)
def test_values_of_the_wrong_kind_name_the_option(options: dict[str, object], message: str) -> None:
    """What cannot be put into the field is refused here, naming field and value."""
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        options_message(options)
    assert caught.value.field == f"options.{next(iter(options))}"


@pytest.mark.parametrize(
    ("kind", "enum"),
    [
        (JobState, job_pb2.JobState.DESCRIPTOR),
        (StopReason, job_pb2.StopReason.DESCRIPTOR),
        (ImageFormat, image_pb2.ImageFormat.DESCRIPTOR),
        (ModelState, model_service_pb2.ModelState.DESCRIPTOR),
        (OptionType, options_pb2.OptionType.DESCRIPTOR),
    ],
)
def test_enums_are_the_contracts(kind: type, enum: object) -> None:
    """Every enum of the client has exactly the contract's members, and one for what is newer."""
    assert list(kind) == ["unknown", *choices(enum)]


def test_no_option_hides_behind_a_parameter() -> None:
    """No option has the name of one of `stylize`'s own parameters, which would make it unreachable."""
    own = set(inspect.signature(Client.stylize).parameters)
    assert not own & set(OPTIONS.fields_by_name)
