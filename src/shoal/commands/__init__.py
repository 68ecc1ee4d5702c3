"""One module per subcommand, each with `run(args: argparse.Namespace) -> int` (the exit code).

`shoal.cli` parses and imports only the module that is asked for, so `shoal --help` loads nothing heavy. A
command raises ShoalError for anything the user can mend; the command line prints it and exits with its code.
`args` (see `shoal.arguments`) holds:

    pull      source: str, dtype: "int8"|"int4"|"f32"|"keep", head_dtype: "int8"|"int4"|None, has_min: bool,
              kv_dtype: "f32"|"f16"|"int8"|None, name: str|None
    ls        (nothing)
    rm        names: list[str]
    convert   source: Path, destination: Path, equalise: bool, dtype, head_dtype, has_min, kv_dtype as for
              pull
    verify    model: str
    inspect   model: str, json: bool
    run       model: str, prompt: str|None, nodes: tuple[tuple[str, int], ...], max_tokens: int,
              temperature: float, top_k: int, top_p: float, min_p: float, repeat_penalty: float,
              seed: int|None, stop: list[str], system: str|None, raw: bool, context: int|None, stats: bool,
              threads, backend, isa, resident
    plan      model: str, devices: Path|None, nodes: as for run (one of the two is given), context: int,
              streams: int, objective: "latency"|"throughput", json: bool
    profile   model: str, json: bool, threads, backend, isa, resident
    bench     model: str, n_prompt, n_gen, n_depth, batch: tuple[int, ...], threads: tuple[int, ...]|None,
              repetitions: int, output: "md"|"json"|"csv", backend, isa, resident
    node      model: str, listen: tuple[str, int], name: str|None, ram: int|None (MB), slow: float,
              slow_file: Path|None, slow_turns: Path|None, measure_seconds: float, insecure: bool,
              port_file: Path|None, threads, backend, isa, resident
    demo      timeout: int (seconds), prompt: str

Where they occur, threads: int|None, backend: "auto"|"native"|"numba"|"numpy", and isa: str ("auto" or the
name of a kernel set), resident: bool|None. `model` is a name that `shoal ls` shows, or a path to a model
directory. `traceback: bool` is always there.
"""
