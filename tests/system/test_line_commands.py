"""`shoal score` over lines, in processes: killed and continued, over pipes, with output that is refused."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.patience import LIMIT
from tests.system.conftest import environment, shell

import shoal
from shoal.processes import NodeSpec, nodes

HASTY = """
import sys
from shoal import line_job
from shoal.cli import main
line_job._SAVE_S = 0.02
sys.exit(main(sys.argv[1:]))
"""
"""The shoal command, saving its state after 20 ms, so that a short job has many."""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 lines, every hundredth without a result, with characters of the tiny model's tokenizer."""
    generator = random.Random(7)
    path = tmp_path_factory.mktemp("lines") / "lines.txt"
    with path.open("wb") as file:
        for number in range(1, 1001):
            text = "".join(chr(256 + generator.randrange(100)) for _ in range(generator.randint(2, 60)))
            bad = [b"", b"\xc3(", ("\u0100" * 500).encode()][number // 100 % 3]
            file.write((text.encode() if number % 100 else bad) + b"\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(lines: Path, cache_home: Path) -> bytes:
    done = shell(f"$S score tiny {lines} --context 100", XDG_CACHE_HOME=str(cache_home))
    assert done.returncode == 19
    assert done.stderr.endswith(b"shoal: 10 of 1000 lines have an error\n")
    assert done.stdout.count(b"\n") == 1000
    return done.stdout


def test_what_an_undisturbed_run_writes(undisturbed: bytes) -> None:
    made = [json.loads(line) for line in undisturbed.splitlines()]
    assert [one["line"] for one in made] == list(range(1, 1001))
    assert set(made[0]) == {"line", "tokens", "logprob", "perplexity"}
    errors = [one["error"] for one in made if "error" in one]
    assert errors[0] == "the line is not UTF-8: byte 0 is 0xc3"
    assert "tokens and the context holds 100" in errors[1]
    assert errors[2] == "the line is empty"
    assert len(errors) == 10


@pytest.mark.slow
def test_killed_at_random_points_and_continued(
    lines: Path, undisturbed: bytes, cache_home: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", HASTY, "score", "tiny", str(lines), "--context", "100", "--batch", "5"]
    command += ["-o", str(output), "--resume"]
    generator = random.Random(3)
    killed, kept = 0, [0]
    for part in (0.1, 0.25, 0.4, 0.6, 0.8):
        target = int(len(undisturbed) * (part + generator.random() / 10))
        with subprocess.Popen(
            command, env=environment(XDG_CACHE_HOME=str(cache_home)), stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and (not output.exists() or output.stat().st_size < target):
                time.sleep(0.001)
            process.kill()
        killed += process.returncode == -9
        kept.append(json.loads((tmp_path / "out.jsonl.job").read_text())["state"]["lines"])
    assert killed >= 4
    assert kept == sorted(kept) and 0 < kept[1] < kept[-1] < 1000
    done = subprocess.run(command, env=environment(XDG_CACHE_HOME=str(cache_home)), capture_output=True)
    assert (done.returncode, done.stdout) == (19, b"")
    assert done.stderr.endswith(b"shoal: 10 of 1000 lines have an error\n")
    assert output.read_bytes() == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_by_a_signal(
    number: int, code: int, lines: Path, undisturbed: bytes, cache_home: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "shoal",
        "score",
        "tiny",
        str(lines),
        "--context",
        "100",
        "-o",
        str(output),
    ]
    with subprocess.Popen(
        command, env=environment(XDG_CACHE_HOME=str(cache_home)), stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and (not output.exists() or not output.stat().st_size):
            time.sleep(0.001)
        process.send_signal(number)
        errors = process.communicate(timeout=LIMIT)[1].decode()
    kept = json.loads((tmp_path / "out.jsonl.job").read_text())["state"]
    assert process.returncode == code
    assert errors.endswith(f"\nshoal: {output} has {kept['lines']} lines; --resume continues it\n")
    assert output.stat().st_size == kept["output_bytes"] > 0  # also if that was less than a second's work
    done = subprocess.run(
        [*command, "--resume"], env=environment(XDG_CACHE_HOME=str(cache_home)), capture_output=True
    )
    assert (done.returncode, output.read_bytes()) == (19, undisturbed)


@pytest.mark.slow
def test_pipes(lines: Path, undisturbed: bytes, cache_home: Path, tmp_path: Path) -> None:
    home = {"XDG_CACHE_HOME": str(cache_home)}
    piped = shell(f"cat {lines} | $S score tiny --context 100 --batch 50", **home)
    assert (piped.returncode, piped.stdout) == (19, undisturbed)
    first = b"".join(undisturbed.splitlines(keepends=True)[:80])
    out = tmp_path / "out"
    assert shell(f"head -80 {lines} | $S score tiny --context 100 -o {out}", **home).returncode == 0
    assert out.read_bytes() == first
    assert shell(f"$S score tiny --context 100 -o {out} --resume <{lines}", **home).returncode == 19
    assert out.read_bytes() == undisturbed
    refused = shell(f"tail -900 {lines} | $S score tiny --context 100 -o {out} --resume", **home)
    assert refused.returncode == 1
    assert (
        b"standard input is not what" in refused.stderr and b"its first 1000 lines differ" in refused.stderr
    )
    assert (
        shell(f"$S score tiny {lines} --context 100 2>/dev/null | head -1", **home).stdout
        == (undisturbed[: undisturbed.index(b"\n") + 1])
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        (">/dev/full", 16, "standard output: No space left on device: send the output elsewhere"),
        (">&-", 16, "standard output: it is closed: send the output elsewhere"),
        ("-o /dev/full", 16, "/dev/full cannot be written: No space left on device: free space there"),
        ("-o /nowhere/out", 16, "/nowhere/out: No such file or directory: check the path"),
        ("--resume", 1, "--resume continues a file: give its name with -o FILE"),
        ("--nodes 127.0.0.1:1 --threads 2", 1, "--threads does not go with --nodes, which compute: "),
        (
            "0>/dev/null",
            16,
            "standard input cannot be read: Bad file descriptor: give the input as an argument",
        ),
    ],
)
def test_what_is_refused(line: str, code: int, error: str, cache_home: Path) -> None:
    done = shell(f"echo ĂĂĂ | $S score tiny {line}", XDG_CACHE_HOME=str(cache_home))
    assert (done.returncode, done.stdout) == (code, b"")
    assert f"shoal: error: {error}" in done.stderr.decode()


@pytest.mark.slow
def test_classify_and_embed(lines: Path, cache_home: Path, tmp_path: Path) -> None:
    home = {"XDG_CACHE_HOME": str(cache_home)}
    some = lines.read_bytes().splitlines()[80:130]
    (tmp_path / "some").write_bytes(b"\n".join(some))
    for command in ("classify tiny --labels Ă,ă=Ąą --prompt '{text}Ć'", "embed tiny --pooling last"):
        whole = shell(f"$S {command} {tmp_path}/some", **home)
        assert whole.returncode == 19
        assert whole.stdout.count(b"\n") == 50
        out = tmp_path / command[:5]
        begun = shell(f"head -30 {tmp_path}/some | $S {command} -o {out}", **home)
        assert begun.returncode == 19
        again = shell(f"$S {command} {tmp_path}/some --batch 7 -o {out} --resume", **home)
        assert again.returncode == 19
        assert out.read_bytes() == whole.stdout
    with shoal.LLM(cache_home / "shoal" / "models" / "tiny") as llm:
        good = [line.decode() for i, line in enumerate(some) if i != 19]
        found = llm.classify(good, {"Ă": " Ă", "ă": "Ąą"}, prompt="{text}Ć")
        rows = llm.embed(good, pooling="last")
    made = [json.loads(line) for line in (tmp_path / "class").read_bytes().splitlines()]
    del made[19]
    assert [(one["label"], one["probabilities"]) for one in made] == [
        (one.label, dict(one.probabilities)) for one in found
    ]
    vectors = [
        json.loads(line)["embedding"]
        for line in (tmp_path / "embed").read_bytes().splitlines()
        if b"error" not in line
    ]
    assert np.array_equal(np.array(vectors, np.float32), rows)


@pytest.mark.slow
def test_nodes_begin_and_one_process_ends(
    lines: Path, undisturbed: bytes, cache_home: Path, tmp_path: Path
) -> None:
    model, output = cache_home / "shoal" / "models" / "tiny", tmp_path / "out"
    expected = b"".join(undisturbed.splitlines(keepends=True)[:120])
    some = b"".join(lines.read_bytes().splitlines(keepends=True)[:120])
    command = [
        sys.executable,
        "-m",
        "shoal",
        "score",
        "tiny",
        "--context",
        "100",
        "-o",
        str(output),
        "--resume",
    ]
    with nodes(model, [NodeSpec("a", 200), NodeSpec("b", 200)], tmp_path) as running:
        addresses = ",".join(f"{host}:{port}" for host, port in (node.address for node in running))
        done = subprocess.run(
            [*command, "--nodes", addresses],
            input=b"".join(some.splitlines(keepends=True)[:70]),
            env=environment(XDG_CACHE_HOME=str(cache_home)),
            capture_output=True,
            timeout=LIMIT,
        )
        assert done.returncode == 0, done.stderr.decode()
    # What the nodes have computed stands; one process goes on.
    done = subprocess.run(
        command,
        input=some,
        env=environment(XDG_CACHE_HOME=str(cache_home)),
        capture_output=True,
        timeout=LIMIT,
    )
    assert done.returncode == 19
    assert output.read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "code", "error"),
    [
        ("", 1, "the model has no classification head: give --labels to choose from"),
        ("--labels a,b --prompt x", 1, "--prompt lacks {text}, where each line stands"),
        ("--labels a", 2, "'a' is one label: give two or more, with commas between them"),
        ("--labels a,b,a=x", 2, "a label of 'a,b,a=x' is there twice"),
        ("--labels a,,b", 2, "a label of 'a,,b' is empty"),
        ("--labels a,b=", 2, "a label of 'a,b=' is empty"),
    ],
)
def test_labels_that_are_refused(options: str, code: int, error: str, cache_home: Path) -> None:
    done = shell(f"echo ĂĂ | $S classify tiny {options}", XDG_CACHE_HOME=str(cache_home))
    assert done.returncode == code
    assert error in done.stderr.decode()


def test_a_prompt_that_is_no_text(cache_home: Path) -> None:
    done = shell("echo ĂĂĂ | $S score tiny --prompt '\udcff'", XDG_CACHE_HOME=str(cache_home))
    assert done.returncode == 2
    assert b"argument --prompt: it is not UTF-8 text" in done.stderr


def test_messages_may_be_lost(cache_home: Path) -> None:
    done = shell("echo ĂĂĂ | $S score tiny 2>/dev/full", XDG_CACHE_HOME=str(cache_home))
    assert (done.returncode, json.loads(done.stdout)["tokens"]) == (0, 2)
