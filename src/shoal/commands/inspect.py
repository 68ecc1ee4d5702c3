"""`shoal inspect`: a model's tokenizer and chat template as they are used, and the table of its program: each
op with its shapes, bytes and MACs, unit by unit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..arguments import Commands, add_command, add_json, add_model
from ..engine.errors import MissingDependencyError, ShoalError, UnsupportedModelError
from ..imports import quick_imports

if TYPE_CHECKING:
    from ..engine.chat import Chat
    from ..engine.model_directory import Model
    from ..engine.program import Op, Program, Unit

_SHOWN_LABELS = 12


@dataclass(frozen=True, slots=True)
class _Row:
    """An op, as it is printed."""

    op: str
    inputs: str
    weights: str
    output: str
    bytes: int
    macs: int


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "inspect",
        "show a model's operations, tokenizer and chat template",
        "Each operation is shown with its shapes, the bytes that it reads, and its multiply-accumulates "
        "(MACs).",
    )
    add_model(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the table, or JSON."""
    with quick_imports():
        from ..engine.costs import constant_bytes, tied_bytes, unit_cost
        from ..engine.model_directory import Model
        from ..store import resolve
        from ..text_table import table

    model = Model.open(resolve(args.model))
    if args.json:
        print(json.dumps(_json(model), indent=2))
        return 0
    program, config = model.program, model.config
    units = program.units
    costs = [unit_cost(model, u) for u in range(len(units))]
    total = sum(cost.bytes for cost in costs) - tied_bytes(model) + constant_bytes(program)
    print(f"{model.path}")
    print(f"{config.family}, {_shape(program)}, vocabulary {config.vocab}, context {config.context}")
    macs, kv_bytes = sum(c.macs for c in costs), sum(c.kv_bytes_per_token for c in costs)
    print(
        f"{model.index.weights} weights, {total / 1e6:.1f} MB; {macs / 1e6:.1f} M MACs a token; "
        f"keys and values {kv_bytes / 1e3:.1f} kB a token ({model.kv_dtype}); "
        f"{costs[0].cut_bytes / 1e3:.1f} kB a token cross a cut"
    )
    if config.labels:
        more = ", …" if len(config.labels) > _SHOWN_LABELS else ""
        named = ", ".join(config.labels[:_SHOWN_LABELS]) + more
        print(f"a classification head of {len(config.labels)} labels ({named}), f32")
    print("\n".join(_text_lines(_text(model))))
    print(f"model hash {model.hash}\n")
    header = ("op", "reads", "weights [rows, cols]", "writes", "bytes read", "MACs")
    rows: list[tuple[str, ...]] = [_cells(_row(model, None, op)) for op in program.prologue]
    print(f"at the start of every stage\n{table(header, rows)}\n")
    for first, last in _alike(units):
        title = f"unit {first}: {units[first].name}"
        if last - first > 1:
            title = f"units {first} to {last - 1}: {units[first].name} to {units[last - 1].name}, each"
        cost = costs[first]
        lines = [_cells(_row(model, units[first], op)) for op in units[first].ops]
        lines.append(
            ("total", "", f"{cost.bytes:,} bytes held", "", f"{cost.read_bytes:,}", f"{cost.macs:,}")
        )
        print(f"{title}\n{table(header, lines)}\n")
    return 0


def _text(model: Model) -> dict[str, Any] | None:
    """How text becomes tokens and where an answer ends, as in `shoal run`. None: the model has no
    tokenizer."""
    from ..engine.chat import Chat
    from ..engine.index import TOKENIZER
    from ..engine.tokenizer import Tokenizer

    if TOKENIZER not in model.index.files:
        return None
    try:
        tokenizer = Tokenizer.open(model.path)
        chat = Chat.open(model.path, tokenizer)
    except (MissingDependencyError, UnsupportedModelError) as e:
        return {"error": str(e)}
    added = tokenizer.added_tokens

    def token(i: int) -> dict[str, Any]:
        return {"id": i, "token": tokenizer.token(i), "special": i in added and added[i][1]}

    bos = tokenizer.token_id(chat.special.get("bos_token", ""))
    return {
        "tokenizer": {"kind": tokenizer.kind, "tokens": tokenizer.size, "added": len(added)},
        "around_raw_text": [token(i) for i in tokenizer.encode("")],
        "bos": None if bos is None else token(bos),
        "end": [token(i) for i in model.config.eos],
        "chat_template": _template(chat) if chat.has_template else None,
    }


def _template(chat: Chat) -> dict[str, Any]:
    """The file of the chat template, and how it renders a message."""
    from ..engine.chat import Message
    from ..engine.index import CHAT_TEMPLATE

    message = Message("user", "Hi")
    try:
        example, tokens = chat.render([message]), len(chat.encode([message]))
    except ShoalError as e:
        return {"file": CHAT_TEMPLATE, "error": str(e)}
    return {"file": CHAT_TEMPLATE, "example": example, "example_tokens": tokens}


def _text_lines(text: dict[str, Any] | None) -> list[str]:
    if text is None:
        return ["no tokenizer: prompts and answers are token ids"]
    if "error" in text:
        return [text["error"]]

    def named(tokens: list[dict[str, Any]]) -> str:
        return ", ".join(f"{token['token']!r} ({token['id']})" for token in tokens) or "none"

    tokenizer, template = text["tokenizer"], text["chat_template"]
    counts = f"{tokenizer['tokens']:,} tokens, {tokenizer['added']:,} of them added"
    chat = "no chat template: messages are plain text"
    if template is not None:
        shown = template.get("error") or f"{template['example']!r}, {template['example_tokens']} tokens"
        chat = f"chat template {template['file']}: {shown}"
    return [
        f"tokenizer: {tokenizer['kind']}, {counts}; around raw text: {named(text['around_raw_text'])}",
        f"bos token: {named([text['bos']] if text['bos'] else [])}; end tokens: {named(text['end'])}",
        chat,
    ]


def _shape(program: Program) -> str:
    """Layers, width and heads, as the first attention has them."""
    from ..engine.program import Attend

    layers = [unit for unit in program.units if unit.states]
    attend = next(op for op in layers[0].ops if isinstance(op, Attend))
    state = layers[0].state(attend.state)
    return (
        f"{len(layers)} layers, hidden {program.buffer(program.cut[0]).cols}, {attend.heads} heads "
        f"({state.kv_heads} for keys and values) of {state.head_dim}"
    )


def _row(model: Model, unit: Unit | None, op: Op) -> _Row:
    """The row of an op. `unit` is None for an op of the prologue, whose weights are constants."""

    def shape(name: str) -> str:
        buffer = model.program.buffer(name)
        return f"{name} [{'n' if buffer.domain == 'rows' else 'wanted'}, {buffer.cols}] {buffer.type}"

    weights = [] if unit is None else [unit.weight(name) for name in (*op.weight_names(), *op.bias_names())]
    shapes = (f"{w.name} [{w.rows}, {w.cols}]" if not w.vector else f"{w.name} [{w.cols}]" for w in weights)
    inputs = [shape(name) for name in op.reads()] + [f"state {s}" for s in (op.reads_state(),) if s]
    out, state = op.writes(), op.writes_state()
    output = shape(out) if out else f"state {state}" if state else ""
    macs, size = (op.macs(unit), op.read_bytes(unit)) if unit else (0, 0)
    return _Row(op.kind, ", ".join(inputs), ", ".join(shapes), output, size, macs)


def _cells(row: _Row) -> tuple[str, ...]:
    return (row.op, row.inputs, row.weights, row.output, f"{row.bytes:,}", f"{row.macs:,}")


def _alike(units: tuple[Unit, ...]) -> Iterable[tuple[int, int]]:
    """Half-open ranges of neighbouring units with the same ops and the same shapes."""
    first = 0
    for u in range(1, len(units) + 1):
        if u == len(units) or _signature(units[u]) != _signature(units[first]):
            yield first, u
            first = u


def _signature(unit: Unit) -> Any:
    return unit.ops, [(w.name, w.rows, w.cols) for w in unit.weights]


def _json(model: Model) -> dict[str, Any]:
    from ..engine.costs import tied_bytes, unit_cost

    units = []
    for u, unit in enumerate(model.program.units):
        ops = [asdict(_row(model, unit, op)) for op in unit.ops]
        units.append({**asdict(unit_cost(model, u)), "ops": ops})
    return {
        "path": str(model.path),
        "hash": model.hash,
        "dtype": model.dtype,
        "head_dtype": model.index.head_dtype or model.dtype,
        "has_min": model.index.has_min,
        "config": dict(model.config.values),
        "tied_bytes": tied_bytes(model),
        "labels": list(model.config.labels),
        "text": _text(model),
        "units": units,
    }
