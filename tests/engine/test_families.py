"""Every family against transformers (fixtures), on every backend, from safetensors and from GGUF; and the
same bits whatever the instruction set, threads, chunks and cuts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests import families
from tests.engine.test_logits import chain, options
from tests.families import CASES, IN_GGUF, POSITIONS, TOKENS

from shoal.engine import families as built
from shoal.engine.backends.native import isa_names
from shoal.engine.batch import Sampling
from shoal.engine.calibrate import Calibration
from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.config import parse_config
from shoal.engine.convert import convert
from shoal.engine.equalise import equalise
from shoal.engine.errors import ContextError, ModelFileError, UnsupportedModelError
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.program import HeadNorm, Matmul, Quantise
from shoal.engine.stage import Stage, StageOptions

FIXTURE = Path(__file__).parent.parent / "fixtures" / "families.npz"
Made = Callable[[str, str], Model]


@pytest.fixture(scope="module")
def oracle() -> dict[str, np.ndarray]:
    with np.load(FIXTURE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A case in a type; `-min`: int4 with minima; `-kv`: int8 keys and values. Each is made once."""
    found: dict[tuple[str, str], Model] = {}
    folder = tmp_path_factory.mktemp("families")

    def make(name: str, types: str) -> Model:
        if (name, types) not in found:
            source, target = folder / name, folder / f"{name}-{types}"
            if not source.exists():
                families.write_checkpoint(name, source)
            dtype, _, more = types.partition("-")
            convert(
                source, target, dtype=dtype, has_min=more == "min", kv_dtype="int8" if more == "kv" else None
            )
            found[name, types] = Model.open(target)
        return found[name, types]

    return make


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["native", "numpy", "numba"])
def test_f32_equals_transformers(made: Made, oracle: dict[str, np.ndarray], name: str, backend: str) -> None:
    logits = chain(made(name, "f32"), [], TOKENS, [200, 7, 1], options(backend))
    assert np.abs(logits[POSITIONS] - oracle[f"{name}.logits"]).max() <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(made: Made, oracle: dict[str, np.ndarray], name: str) -> None:
    model = made(name, "f32")
    with Stage(model, 0, model.n_units, StageOptions()) as stage:
        tokens = list(generate(stage, TOKENS[:40], Sampling(), max_tokens=24, end=()))
    assert tokens == oracle[f"{name}.greedy"].tolist()


@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_file_gives_the_same_model(made: Made, name: str, tmp_path: Path) -> None:
    """But for epsilon, which GGUF keeps in f32: so tensors and what the program is made of are compared."""
    source = open_checkpoint(families.write_gguf(name, tmp_path / f"{name}.gguf"))
    tensors = families.tensors(name)
    assert set(source.names) == set(tensors)
    for tensor, values in tensors.items():
        np.testing.assert_array_equal(source.tensor(tensor), values, err_msg=tensor)
    convert(source.path, tmp_path / "model", dtype="f32")
    theirs, ours = Model.open(tmp_path / "model").program, made(name, "f32").program
    assert [unit.weights for unit in theirs.units] == [unit.weights for unit in ours.units]
    assert theirs.buffers == ours.buffers
    assert theirs.constants == ours.constants


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3", "qwen3-biases"])
@pytest.mark.parametrize("types", ["f32", "int8", "int4", "int4-min", "int8-kv"])
def test_bits_do_not_depend_on_set_threads_chunks_or_cuts(made: Made, name: str, types: str) -> None:
    model, tokens = made(name, types), TOKENS[:80]
    whole = chain(model, [], tokens, [80], options("native", isa="scalar"))
    for isa in isa_names():
        for cuts, sizes, threads in (([], [80], 2), ([1, 3], [1, 30, 5], 1), ([1, 2, 3, 4], [17], 3)):
            logits = chain(model, cuts, tokens, sizes, options("native", threads, isa))
            assert logits.tobytes() == whole.tobytes(), (isa, cuts, sizes, threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["native", "numba"])
def test_quantised_backends_agree(made: Made, oracle: dict[str, np.ndarray], name: str, backend: str) -> None:
    """Each differs from floats by what rounding costs, and they from each other by less."""
    model, places = made(name, "int8"), [p for p in POSITIONS if p < 64]
    numpy = chain(model, [], TOKENS[:64], [64], options("numpy"))
    other = chain(model, [], TOKENS[:64], [64], options(backend))
    cost = np.abs(numpy[places] - oracle[f"{name}.logits"][: len(places)]).mean()
    assert 0 < cost < 0.03 * oracle[f"{name}.logits"].std()
    assert np.abs(other - numpy).mean() <= 0.5 * cost


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equalised_weights_compute_the_same_in_floats(name: str, tmp_path: Path) -> None:
    """Every matrix, norm before one and bias of values and of the ungated half changes; the activations do
    not. Biases and norms of queries and keys stay, as scores would not."""
    checkpoint = open_checkpoint(families.write_checkpoint(name, tmp_path / "source"))
    program = built.build(parse_config(checkpoint.config, "x"))
    before, after = Calibration(program, TOKENS), Calibration(program, TOKENS)
    for u, unit in enumerate(program.units[:-1]):
        plain = {w.name: checkpoint.tensor(w.source) for w in unit.weights}
        changed = dict(plain)
        told = equalise(unit, changed, before.run(u, plain))
        after.run(u, changed)
        a, b = before.hidden, after.hidden
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
        moved = {key for key in plain if not np.array_equal(plain[key], changed[key])}
        fixed = {key for key in plain if key.endswith("bias") and key not in ("v.bias", "up.bias")}
        fixed |= {"q_norm.weight", "k_norm.weight"}
        assert told == moved == (set() if u == 0 else set(plain) - fixed)


def test_int8_inputs_are_a_pass_over_the_program(made: Made) -> None:
    floats, integers = made("qwen3-biases", "f32").program, made("qwen3-biases", "int8").program
    assert {b.name: b.type for b in floats.buffers if b.type != "f32"} == {}
    assert {b.name for b in integers.buffers if b.type == "q8"} == {"normed", "attended_q8", "gated", "final"}
    kinds = [op.kind for op in integers.units[1].ops]
    assert kinds == [
        *("norm", "matmul", "head_norm", "head_norm", "rope", "store", "attend", "quantise", "matmul"),
        *("norm", "matmul", "gate", "matmul"),
    ]
    assert not any(isinstance(op, Quantise) for unit in floats.units for op in unit.ops)
    assert [op.column for op in floats.units[1].ops if isinstance(op, HeadNorm)] == [0, 6 * 16]
    (qkv, *_) = (op for op in floats.units[1].ops if isinstance(op, Matmul))
    assert qkv.biases == ("q.bias", "k.bias", "v.bias")


def changed(name: str, folder: Path, **values: object) -> Path:
    """A checkpoint whose config.json says something else; None removes a key."""
    source = families.write_checkpoint(name, folder / "source")
    kept = {k: v for k, v in {**families.config(name), **values}.items() if v != "removed"}
    (source / "config.json").write_text(json.dumps(kept))
    return source


@pytest.mark.parametrize(
    ("name", "values", "context"),
    [
        ("mistral", {"sliding_window": 100}, 100),
        ("mistral", {"sliding_window": 511}, 511),
        ("mistral", {"sliding_window": 512}, 512),
        ("mistral", {"sliding_window": None}, 512),
        ("mistral", {"sliding_window": "removed", "max_position_embeddings": 8192}, 4096),
        ("qwen2", {"sliding_window": 100}, 512),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, 512),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True}, 512),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 3}, 512),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2}, 100),
        (
            "qwen3",
            {
                "sliding_window": 99,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            99,
        ),
        (
            "qwen3",
            {
                "sliding_window": 99,
                "use_sliding_window": True,
                "max_window_layers": 1,
                "layer_types": ["full_attention"] * 3,
            },
            512,
        ),
    ],
)
def test_a_context_ends_where_the_attention_window_does(
    name: str, values: dict[str, object], context: int, tmp_path: Path
) -> None:
    said: list[str] = []
    convert(changed(name, tmp_path, **values), tmp_path / "model", dtype="f32", warn=said.append)
    model = Model.open(tmp_path / "model")
    assert model.config.context == context
    limited = context < (8192 if "max_position_embeddings" in values else 512)
    said = [message for message in said if "window" in message]  # that it has no tokenizer is said too
    assert len(said) == limited
    with Stage(model, 0, model.n_units, StageOptions()) as stage:
        stage.open_sequence(0, Sampling(), context)
        with pytest.raises(ContextError) as error:
            stage.open_sequence(1, Sampling(), context + 1)
    assert (f"its attention window is {context} tokens" in str(error.value)) == limited
    assert all(f"its attention window is {context} tokens" in message for message in said)


@pytest.mark.parametrize(
    ("name", "values", "kind", "message"),
    [
        ("mistral", {"sliding_window": -1}, ModelFileError, "sliding_window must be an integer from 1"),
        ("qwen2", {"use_sliding_window": 1}, ModelFileError, "use_sliding_window must be true or false"),
        ("qwen2", {"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act 'gelu' is not supported"),
        ("qwen3", {"head_dim": "removed"}, ModelFileError, r"shape \(32,\)|shape \(192, 72\)"),
        ("qwen3", {"attention_bias": True}, ModelFileError, r"k_proj\.bias' is missing"),
        ("qwen3", {"model_type": "qwen2"}, ModelFileError, r"k_proj\.bias' is missing"),
        (
            "qwen2",
            {"model_type": "llama"},
            UnsupportedModelError,
            r"k_proj\.bias' is not used by this family",
        ),
        (
            "qwen3",
            {"model_type": "llama"},
            UnsupportedModelError,
            r"k_norm\.weight' is not used by this family",
        ),
        (
            "llama-biases",
            {"mlp_bias": False},
            UnsupportedModelError,
            r"down_proj\.bias' is not used by this family",
        ),
    ],
)
def test_a_configuration_that_is_not_the_checkpoints_is_refused(
    name: str, values: dict[str, object], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    source = changed(name, tmp_path, **values)
    with pytest.raises(kind, match=message) as error:
        convert(source, tmp_path / "model", dtype="f32")
    assert str(source) in str(error.value)
