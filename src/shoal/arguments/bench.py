"""`bench`: lists of what to measure."""

from .kinds import counts, positive, wholes
from .shared import Commands, add_kernels, add_model, command


def bench(commands: Commands) -> None:
    parser = command(
        commands,
        "bench",
        "measure tokens/s of a model on this device alone: prompts (pp) and generated tokens (tg)",
        "Numbers may be lists: `-t 1,2` measures with one thread, and then with two.",
    )
    add_model(parser)
    lists: tuple[tuple[tuple[str, ...], str, tuple[int, ...] | None, str], ...] = (
        (("-p", "--n-prompt"), "N", (512,), "tokens of a prompt, run in one go; 0: none (default 512)"),
        (("-n", "--n-gen"), "N", (128,), "tokens generated one by one; 0: none (default 128)"),
        (("-d", "--n-depth"), "N", (0,), "tokens that the context holds before (default 0)"),
        (("-t", "--threads"), "N", None, "threads (default: chosen for this device)"),
        (("--batch",), "N", (1,), "sequences that generate side by side (default 1)"),
    )
    for flags, metavar, default, text in lists:
        kind = counts if flags[0] in {"-t", "--batch"} else wholes
        parser.add_argument(*flags, type=kind, metavar=metavar, default=default, help=text)
    parser.add_argument(
        "-r", "--repetitions", type=positive, default=5, metavar="N", help="times each is run (default 5)"
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("md", "json", "csv"),
        default="md",
        help="md: a table; json and csv: all figures (default md)",
    )
    add_kernels(parser.add_argument_group("engine"))
