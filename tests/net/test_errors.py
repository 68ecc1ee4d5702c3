"""The errors of the network: exit codes, their way over the wire, and groups of them."""

import pytest
import trio

import shoal.engine.errors
import shoal.net.errors
from shoal.engine.errors import ContextError, ModelFileError, ShoalError
from shoal.net.connection import open_tasks
from shoal.net.errors import (
    NetError,
    NodeLostError,
    RemoteProtocolError,
    from_wire,
    leading,
    printable,
    to_wire,
)


def all_errors() -> list[type[ShoalError]]:
    found = {
        value
        for module in (shoal.engine.errors, shoal.net.errors)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ShoalError)
    }
    return sorted(found, key=lambda kind: kind.exit_code)


def test_every_error_has_a_code_of_its_own_and_comes_back_as_itself() -> None:
    kinds = all_errors()
    assert len(kinds) == 17
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    for kind in kinds:
        error = from_wire(*to_wire(kind("out of luck")), "pi")
        assert (type(error), str(error)) == (kind, "pi: out of luck")


def test_an_error_of_no_class_of_ours_and_an_unknown_code() -> None:
    assert to_wire(ValueError("odd")) == (NetError.exit_code, "odd")
    assert to_wire(ZeroDivisionError()) == (NetError.exit_code, "ZeroDivisionError")
    assert type(from_wire(250, "from the future", "pi")) is NetError


def test_text_is_made_fit_for_a_terminal() -> None:
    assert printable("a\x1b[2J\nb\ud800", 99) == "a [2J b "
    assert printable("abcdef", 4) == "abc…"
    assert printable("abcd", 4) == "abcd"
    assert len(to_wire(ShoalError("x" * 5000))[1]) == 1000


def test_one_error_comes_out_of_its_groups() -> None:
    error = ModelFileError("x")
    assert leading(ExceptionGroup("outer", [ExceptionGroup("inner", [error])])) is error


def test_of_several_errors_for_the_user_the_first_leads_and_names_the_others() -> None:
    first, second = NodeLostError("a"), ContextError("b")
    assert leading(ExceptionGroup("", [first, ExceptionGroup("", [second])])) is first
    assert first.__notes__ == ["also: b"]


def test_a_mistake_of_ours_stays_in_its_group() -> None:
    group = ExceptionGroup("", [KeyError("bug"), NodeLostError("a")])
    assert leading(group) is group


def test_tasks_fail_with_the_error_itself_and_keep_its_cause() -> None:
    async def fail() -> None:
        try:
            raise OSError("low")
        except OSError as error:
            raise RemoteProtocolError("high") from error

    async def main() -> None:
        async with open_tasks() as tasks:
            tasks.start_soon(fail)

    with pytest.raises(RemoteProtocolError, match="high") as caught:
        trio.run(main)
    assert isinstance(caught.value.__cause__, OSError)


def test_tasks_that_fail_with_a_bug_beside_keep_their_group() -> None:
    async def bug() -> None:
        raise KeyError("bug")

    async def main() -> None:
        async with open_tasks() as tasks:
            tasks.start_soon(bug)
            raise NodeLostError("a")

    with pytest.raises(ExceptionGroup):
        trio.run(main)
