"""shoal runs one language model across the devices a person already owns.

These names are the public API; everything else may change without notice. Names load on first use, so
`import shoal` is quick, and a phone that only runs a node never needs the tokenizer or the solver.

    import shoal

    llm = shoal.LLM("smollm2-135m")
    print(llm.chat("What is a shoal?").text)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answer_text import Stream as Stream
    from .async_llm import AsyncChatSession as AsyncChatSession
    from .async_llm import AsyncLLM as AsyncLLM
    from .async_llm import AsyncStream as AsyncStream
    from .chat_session import ChatSession as ChatSession
    from .engine.batch import Logprobs as Logprobs
    from .engine.batch import Result as Result
    from .engine.batch import Run as Run
    from .engine.batch import Sampling as Sampling
    from .engine.batch import Want as Want
    from .engine.errors import CancelledRunError as CancelledRunError
    from .engine.errors import ContextError as ContextError
    from .engine.errors import DownloadError as DownloadError
    from .engine.errors import MissingDependencyError as MissingDependencyError
    from .engine.errors import ModelFileError as ModelFileError
    from .engine.errors import NoPlanError as NoPlanError
    from .engine.errors import OperatingSystemError as OperatingSystemError
    from .engine.errors import ShoalError as ShoalError
    from .engine.errors import UnsupportedModelError as UnsupportedModelError
    from .engine.generate import TextStream as TextStream
    from .engine.generate import generate as generate
    from .engine.model_directory import Model as Model
    from .engine.stage import Stage as Stage
    from .engine.stage import StageOptions as StageOptions
    from .engine.tokenizer import Tokenizer as Tokenizer
    from .llm import LLM as LLM
    from .llm import Options as Options
    from .net.errors import AddressInUseError as AddressInUseError
    from .net.errors import LocalProtocolError as LocalProtocolError
    from .net.errors import MismatchError as MismatchError
    from .net.errors import NetError as NetError
    from .net.errors import NodeLostError as NodeLostError
    from .net.errors import RemoteProtocolError as RemoteProtocolError
    from .net.errors import StageStuckError as StageStuckError
    from .net.errors import UntrustedError as UntrustedError
    from .results import Classification as Classification
    from .results import Completion as Completion
    from .results import Score as Score
    from .results import Timings as Timings
    from .results import Usage as Usage

__version__ = "0.1.0"

_NAMES = {
    "answer_text": ("Stream",),
    "async_llm": ("AsyncChatSession", "AsyncLLM", "AsyncStream"),
    "chat_session": ("ChatSession",),
    "engine.batch": ("Logprobs", "Result", "Run", "Sampling", "Want"),
    "engine.errors": (
        "CancelledRunError", "ContextError", "DownloadError", "MissingDependencyError", "ModelFileError",
        "NoPlanError", "OperatingSystemError", "ShoalError", "UnsupportedModelError",
    ),
    "engine.generate": ("TextStream", "generate"),
    "engine.model_directory": ("Model",),
    "engine.stage": ("Stage", "StageOptions"),
    "engine.tokenizer": ("Tokenizer",),
    "llm": ("LLM", "Options"),
    "net.errors": (
        "AddressInUseError", "LocalProtocolError", "MismatchError", "NetError", "NodeLostError",
        "RemoteProtocolError", "StageStuckError", "UntrustedError",
    ),
    "results": ("Classification", "Completion", "Score", "Timings", "Usage"),
}  # fmt: skip
_EXPORTS = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
