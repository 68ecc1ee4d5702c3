"""`shoal serve`: a model over HTTP, with the interface of OpenAI's API."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from ..arguments import (
    Commands,
    add_alone,
    add_command,
    add_context,
    add_engine,
    add_insecure,
    add_model,
    add_nodes,
    add_private,
    add_wait,
    check_nodes,
    listed,
    name,
    whole,
)
from ..http_arguments import HOST, PORT, add_http


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        "serve a model to other programs over HTTP",
        "The interface is that of OpenAI's API (docs/server.md): set a client's base URL to "
        "http://127.0.0.1:8080/v1. MODEL may also be a SOURCE of `shoal pull`.",
    )
    add_model(parser)
    add_nodes(
        parser,
        "run on these nodes (default: on the devices of `shoal up`, if it runs here with this model, else in "
        "this process)",
    )
    add_insecure(parser)
    add_private(parser)
    add_alone(parser)
    web = parser.add_argument_group("HTTP")
    web.add_argument("--host", default=HOST, help=f"address to listen on (default {HOST})")
    web.add_argument(
        "--port",
        type=whole,
        default=PORT,
        metavar="N",
        help=f"port to listen on (default {PORT}; 0: a free one)",
    )
    web.add_argument(
        "--name",
        type=listed(name),
        default=(),
        metavar="NAME,...",
        help="what requests may call the model (default: the name of its directory)",
    )
    add_http(web)
    add_context(parser)
    add_wait(parser)
    add_engine(parser)
    parser.set_defaults(prompt=None, stats=False, moves="move")  # for open_llm


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the server was told to end."""
    from ..contexts import context_of
    from ..engine.model_directory import Model
    from ..first_use import model_directory
    from ..local.reconnecting import ReconnectingEngine
    from ..nodes import Nodes
    from ..portal import logging_thread
    from ..server.app import serve_app
    from ..server.http import Limits
    from ..server.opening import opened
    from ..server.run import options_of
    from ..server.run import run as serve
    from .run import open_llm, tell

    model = Model.open(model_directory(args.model))
    check_nodes(args.nodes)
    web = opened(args, args.host, args.port, tell)
    with ExitStack() as stack:
        log = stack.enter_context(logging_thread(tell))
        llm, where = stack.enter_context(open_llm(args, model, context_of(args.context, model)))
        engine = llm._engine
        status = engine.status if isinstance(engine, ReconnectingEngine | Nodes) else None
        options = options_of(args, web, args.name)
        app = serve_app(engine, model, llm.context, options, log, status=status)
        log(f"{model.path.name} on {where}")
        serve(app, web.listeners, web.tls, Limits(grace=args.grace), log)
    return 0
