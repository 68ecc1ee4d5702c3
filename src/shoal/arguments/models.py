"""Models on this device: `pull`, `ls`, `rm`, `convert`, `verify`, `inspect`."""

from pathlib import Path

from .shared import Commands, add_dtype, add_json, add_model, command


def pull(commands: Commands) -> None:
    parser = command(
        commands,
        "pull",
        "fetch a model and convert it for use here",
        "An interrupted download goes on where it stopped.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="smollm2-135m; or hf:ORG/NAME, a repository on Hugging Face, or hf:ORG/NAME:TYPE or :FILE, one "
        "of its GGUF files; or a local directory or .gguf file",
    )
    add_dtype(parser)
    parser.add_argument("--name", help="what to call it in `shoal ls` (default: after the source)")


def ls(commands: Commands) -> None:
    command(commands, "ls", "list the models on this device, and where they are kept")


def rm(commands: Commands) -> None:
    parser = command(
        commands,
        "rm",
        "remove models from this device",
        "What was fetched to make them stays; `ls` shows it.",
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="a name from `shoal ls`")


def convert(commands: Commands) -> None:
    parser = command(
        commands,
        "convert",
        "turn a checkpoint (safetensors directory or .gguf file) into a model directory",
        "`shoal pull PATH` does the same into the cache.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="directory with config.json and *.safetensors, or a .gguf file",
    )
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="the model directory to write; must not exist yet"
    )
    add_dtype(parser)
    parser.add_argument(
        "--no-equalise",
        dest="equalise",
        action="store_false",
        help="int8, int4: do not balance the channels before rounding (a little less exact)",
    )


def verify(commands: Commands) -> None:
    parser = command(commands, "verify", "read every file of a model again and compare it with its SHA-256")
    add_model(parser)


def inspect(commands: Commands) -> None:
    parser = command(
        commands, "inspect", "show a model as a table: each operation, its shapes, bytes and multiplications"
    )
    add_model(parser)
    add_json(parser)
