"""`run`: what to answer, where, and how tokens are drawn."""

from .kinds import factor, fraction, non_negative, positive, whole
from .shared import Commands, add_engine, add_model, add_nodes, command


def run(commands: Commands) -> None:
    parser = command(
        commands,
        "run",
        "answer a prompt, or chat",
        "Without PROMPT: a chat on a terminal, otherwise the prompt is read from standard input. MODEL may "
        "also be what `shoal pull` takes (hf:ORG/NAME, a .gguf file, a checkpoint): it is converted on first "
        "use.",
    )
    add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to answer")
    add_nodes(parser, "run on these nodes, in a chain (default: in this process alone)")
    text = parser.add_argument_group("text")
    text.add_argument(
        "-n",
        "--max-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="stop after N tokens (default 512)",
    )
    text.add_argument("--system", metavar="TEXT", help="the system message (default: the model's own)")
    text.add_argument(
        "--raw", action="store_true", help="continue PROMPT as it is, without the chat template"
    )
    text.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be given again"
    )
    text.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens of prompt and answer to make room for (default: the model's, or the most that fits)",
    )
    sampling = parser.add_argument_group("sampling (default: always the likeliest token)")
    sampling.add_argument(
        "--temperature",
        type=non_negative,
        default=0.0,
        metavar="T",
        help="0: greedy; 0.8: livelier (default 0)",
    )
    sampling.add_argument(
        "--top-k", type=whole, default=0, metavar="K", help="draw from the K likeliest (default 0: all)"
    )
    sampling.add_argument(
        "--top-p",
        type=fraction,
        default=1.0,
        metavar="P",
        help="draw from the likeliest that sum to P (default 1: all)",
    )
    sampling.add_argument(
        "--min-p",
        type=fraction,
        default=0.0,
        metavar="P",
        help="drop those below P times the likeliest (default 0)",
    )
    sampling.add_argument(
        "--repeat-penalty",
        type=factor,
        default=1.0,
        metavar="R",
        help="divide what was said before by R (default 1: off)",
    )
    sampling.add_argument(
        "--seed", type=whole, metavar="S", help="draw the same tokens again (default: a new one each time)"
    )
    add_engine(parser)
    parser.add_argument(
        "--stats", action="store_true", help="afterwards print tokens/s and times on standard error"
    )
